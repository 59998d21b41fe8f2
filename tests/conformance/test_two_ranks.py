"""The DeepSpeed engine on two ranks computes what the reference computes on one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rank_worker import script

from tinsmithd.trainer.engines.factory import make_engine


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_agree_with_the_reference(
    tiny_model: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Losses, logprobs and norms to 1e-5, weights to 1e-6, with more ranks than data too."""
    out = tmp_path / "results.npz"
    worker = Path(__file__).with_name("rank_worker.py")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(worker), str(tiny_model), str(zero_stage), str(out)),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]

    reference = make_engine(
        "reference", str(tiny_model), dtype="float32", zero_stage=1, on_progress=lambda _: None
    )
    expected = script(reference)
    found = dict(np.load(out))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if "weight" in name:
            np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], array, rtol=1e-5, err_msg=name)
