"""A proxy in the environment is for what lies outside the cluster."""

from pathlib import Path

import numpy as np

import tinsmith
from clusters import RunningCluster
from programs import environment
from recording_proxy import RecordingProxy
from tinsmith import types

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")
OPEN = ("no_proxy", "no_grpc_proxy", "NO_PROXY")
"""Empty, so that nothing else keeps the proxy away."""


def test_links_inside_the_cluster_never_use_a_proxy(tiny_model: Path, tmp_path: Path) -> None:
    """Ranks attach, a save and a sample go from server to server, `up` sees all of them serve."""
    datum = types.Datum(
        types.ModelInput.from_ints([1, 2, 3]),
        {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)},
    )
    with RecordingProxy() as proxy:
        settings = {
            **dict.fromkeys(VARIABLES, f"http://{proxy.address}"),
            **dict.fromkeys(OPEN, ""),
        }
        with environment(**settings):
            running = RunningCluster(tiny_model, tmp_path)
        with running, tinsmith.ServiceClient(base_url=running.address) as service:
            client = service.create_lora_training_client(running.base_model, rank=2).result(60)
            client.forward_backward([datum], "cross_entropy").result(60)
            client.optim_step(types.AdamParams()).result(60)
            sampler = client.save_weights_and_get_sampling_client().result(60)
            params = types.SamplingParams(max_tokens=2)
            made = sampler.sample(types.ModelInput.from_ints([1, 2]), 1, params).result(60)
            assert len(made.sequences[0].tokens) == 2
            path = client.save_state("here").result(60).path
            client.load_state(path).result(60)
        assert proxy.asked == []
