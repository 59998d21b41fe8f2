"""A proxy in the environment is for what lies outside the cluster."""

import socket
import threading
from pathlib import Path

import numpy as np

import tinsmith
from clusters import RunningCluster
from faults.harness import environment
from tinsmith import types

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")
OPEN = ("no_proxy", "no_grpc_proxy", "NO_PROXY")
"""Empty, so that nothing else keeps the proxy away."""


class RecordingProxy:
    """Takes connections, writes down what they ask for, and lets nothing through."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))

    def __enter__(self) -> "RecordingProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


def test_links_inside_the_cluster_never_use_a_proxy(tiny_model: Path, tmp_path: Path) -> None:
    """Ranks attach, a save and a sample go from server to server, `up` sees all of them serve."""
    datum = types.Datum(
        types.ModelInput.from_ints([1, 2, 3]),
        {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)},
    )
    with RecordingProxy() as proxy:
        settings = {**dict.fromkeys(VARIABLES, proxy.address), **dict.fromkeys(OPEN, "")}
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
