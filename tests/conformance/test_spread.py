"""Several ranks compute one datum together: the numbers of one rank, a share of its memory."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spread_worker import CASES, LORA

import programs
from tinsmithd.config import ConfigError, TrainerConfig
from tinsmithd.sizes import activations, read_architecture, spread_bytes
from tinsmithd.sizes.plan import _together
from tinsmithd.trainer.compute.spread import problem, shares
from tinsmithd.trainer.engines.factory import check_ranks
from tiny_models import write_tiny_model

PUBLISHED = Path(__file__).parents[1] / "architectures"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "pairs": {},
    "one-key-head": {"num_key_value_heads": 1},  # both ranks have a copy of it
    "windows": {
        "family": "qwen3",
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 40,
    },
}
COMPUTED = [("pairs", "long"), ("pairs", "stage-3"), ("one-key-head", "odd"), ("windows", "odd")]
"""By model and case."""

Compute = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Compute:
    """Folder of what so many ranks computed in all cases of a model."""
    root, done = tmp_path_factory.mktemp("spread"), set[Path]()

    def compute(model: str, ranks: int) -> Path:
        out = root / f"{model}-{ranks}"
        if out not in done:
            folder = root / model
            if not folder.exists():
                write_tiny_model(folder, context_length=8192, **MODELS[model])
            out.mkdir()
            cases = [case for name, case in COMPUTED if name == model]
            arguments = (str(folder), str(out), *cases)
            ended = programs.run("spread_worker", *arguments, ranks=ranks, forked=True)
            assert ended.returncode == 0, ended.stderr[-3000:]
            done.add(out)
        return out

    return compute


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("model", "case"), COMPUTED)
def test_ranks_together_compute_what_one_computes(computed: Compute, model: str, case: str) -> None:
    """Losses, logprobs, gradients, norms and weights after each of two steps, to 1e-5."""
    alone, together = (dict(np.load(computed(model, n) / f"{case}.npz")) for n in (1, 2))
    assert alone.keys() == together.keys()
    for name, array in alone.items():
        scale = np.abs(array).max()
        atol = 1e-5 * (scale if "gradients" in name else 1)
        np.testing.assert_allclose(together[name], array, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize(("model", "case"), [pair for pair in COMPUTED if pair[0] != "windows"])
def test_each_rank_keeps_its_share(computed: Compute, model: str, case: str) -> None:
    """What autograd keeps for the way back on each of two ranks / on one; masks of windows, which
    are whole on each, are apart."""
    alone = json.loads((computed(model, 1) / f"{case}.0.json").read_text())
    assert alone["composition"] == {"ranks": 1, "rounds": [[[[0, [0]]]]]}
    assert alone["kept"] > CASES[case].tokens * 1000
    for rank in range(2):
        found = json.loads((computed(model, 2) / f"{case}.{rank}.json").read_text())
        assert found["composition"] == {"ranks": 2, "rounds": [[[[0, [0], 2]], []]]}
        assert found["kept"] / alone["kept"] <= 0.6


@pytest.mark.parametrize("model", ["pairs", "one-key-head"])
def test_it_keeps_what_the_plan_says(computed: Compute, model: str) -> None:
    """Bytes of a rank's tokens by the formulas of `sizes`, on one rank and on two, within 5 %."""
    case = next(case for name, case in COMPUTED if name == model)
    computed(model, 1)
    architecture = read_architecture(computed(model, 1).parent / model)
    said = activations(architecture, LORA, dtype="float32", partitioned=False).plain_bytes
    for ranks in (1, 2):
        of_layer = spread_bytes(architecture, dtype="float32", ranks=ranks)
        found = json.loads((computed(model, ranks) / f"{case}.0.json").read_text())
        of_token = found["kept"] / shares(CASES[case].tokens, ranks)[0]
        assert said + architecture.layer_count * of_layer == pytest.approx(of_token, rel=0.05)


# --- what cannot be spread ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "why"),
    [
        (32, 8, 8, ""),
        (32, 8, 16, ""),
        (32, 8, 1, ""),
        (9, 3, 3, ""),
        (9, 3, 9, ""),
        (9, 3, 2, "its 9 attention heads cannot be shared out evenly to 2 ranks"),
        (12, 4, 6, "its 4 key/value heads cannot be shared out evenly to 6 ranks"),
    ],
)
def test_heads_are_shared_out_evenly_or_not_at_all(
    heads: int, kv_heads: int, ranks: int, why: str
) -> None:
    """The sentence names both numbers."""
    config = type("Config", (), {"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    assert problem(config, ranks) == why
    head = {"head_count": heads, "kv_head_count": kv_heads}
    model = replace(read_architecture(PUBLISHED / "Qwen3-8B.json"), **head)
    assert (ranks in _together(model, ranks)) == (not why)  # the plan says the same


def test_every_token_is_on_one_rank() -> None:
    """As many on each, but for one."""
    for tokens, ranks in ((8, 4), (9, 4), (11, 4), (4, 4)):
        found = shares(tokens, ranks)
        assert sum(found) == tokens
        assert max(found) - min(found) <= 1 <= min(found)


def test_what_is_not_built_is_refused_with_a_sentence(tiny_model: Path) -> None:
    """By the settings alone; by the number of ranks; by the model's heads, before it computes."""
    for key in ("tensor_parallel", "expert_parallel"):
        with pytest.raises(ConfigError, match=rf"trainer\.{key}: .* is not built; zero_stage = 3"):
            TrainerConfig(base_model="x", **{key: 2})
    with pytest.raises(ConfigError, match="the reference engine computes in one process"):
        TrainerConfig(base_model="x", engine="reference", sequence_parallel=2)
    check_ranks(2, 4)
    with pytest.raises(ConfigError, match=r"is 4, which does not divide the 6 rank\(s\)"):
        check_ranks(4, 6)
    done = programs.run(
        *("spread_worker", str(tiny_model), "", "odd"), ranks=3, timeout_s=60, forked=True
    )
    assert done.returncode
    sentence = "tiny-llama: its 4 attention heads cannot be shared out evenly to 3 ranks"
    assert sentence in done.stderr
