"""Certificates of the rank link are replaced while ranks train: no call is lost, and no bit.

A stream that is there goes on with what it began with. Each one that follows is a new connection,
by what the files hold then; here an authority that nobody knew at the start.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import tinsmith
from certificates import Issued
from faults.processes import Training
from kube.worker import batch
from tinsmith import types
from tinsmithd.tls.throwaway import LOCAL_NAMES, Authority

pytestmark = pytest.mark.timeout(300)

STEPS = 6
OLD, NEW = "spiffe://cluster/old", "spiffe://cluster/new"


class Link:
    """A Training server and a rank, which know each other by certificates.

    Args:
        base_model: Folder of the base model.
        folder: Data, logs and certificates.
    """

    def __init__(self, base_model: Path, folder: Path) -> None:
        self._server = Issued(folder / "server-tls")
        self._rank = Issued(folder / "rank-tls", self._server.authority, (OLD,))
        settings = self._server.settings("cluster_tls")
        self.training = Training(base_model, folder, cluster_names=OLD, **settings)
        self.start_rank()

    def start_rank(self) -> None:
        """Start a rank that attaches."""
        self.training.start_rank(engine="reference", **self._rank.settings("cluster_tls"))

    def rotate(self) -> None:
        """Replace everything on both sides: authority, certificates, and the rank's name."""
        authority = Authority("another")
        self._server.vouched_by(authority, LOCAL_NAMES)
        self._rank.vouched_by(authority, (NEW,))

    def restart_server(self) -> None:
        """Kill the server; the next one lets in nobody but who has the rank's new name."""
        self.training.restart_server(cluster_names=NEW)

    def replace_rank(self) -> None:
        """Kill the rank and start another one."""
        self.training.ranks[-1].kill()
        self.start_rank()


def train(address: str, at: Mapping[int, Callable[[], object]]) -> list[str]:
    """Losses and gradient norms of a new model, in full; something happens under some steps."""
    service = tinsmith.ServiceClient(base_url=address)
    (base_model,) = service.get_server_capabilities().supported_models
    client = service.create_lora_training_client(base_model.model_name, rank=4, seed=7).result(120)
    said = []
    for step in range(STEPS):
        computed = client.forward_backward(batch(step), "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-2))
        if step in at:
            at[step]()
        metrics = {**computed.result(120).metrics, **stepped.result(120).metrics}
        said += [metrics["loss:sum"].hex(), metrics["grad_norm:last"].hex()]
    return said


def test_new_certificates_reach_ranks_and_server_while_they_train(
    tiny_model: Path, tmp_path: Path
) -> None:
    """First the rank lives through it and attaches to a new server, then the server does and is
    attached to by a new rank: that knows only a certificate which it was not started with."""
    link = Link(tiny_model, tmp_path)
    with link.training:
        address = link.training.address
        undisturbed = train(address, {})
        happens = {
            1: link.rotate,
            2: link.restart_server,
            3: link.rotate,
            4: link.replace_rank,
        }
        assert train(address, happens) == undisturbed
