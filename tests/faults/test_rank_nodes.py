"""A rank group on two machines: one that loses a rank, or is gone, takes the other along, and back.

The machines are processes here, as pods are on one node.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

import tinsmith
from clusters import children, free_ports, rank_groups, until_gone
from faults.processes import Process, Training
from kube.worker import batch
from tinsmith import types
from tiny_models import write_tiny_model

pytestmark = pytest.mark.timeout(600)

STEPS = 5
RANKS = 2


class Machines:
    """Two of them, each with two ranks, and a Training server.

    Attributes:
        address: The server's.
        machines: By number.
    """

    def __init__(self, base_model: Path, folder: Path) -> None:
        self.training = Training(base_model, folder)
        self.address = self.training.address
        self._meet = f"127.0.0.1:{free_ports()}"
        # The second first: it waits for the other.
        self.machines = {node: self.start(node) for node in (1, 0)}

    def start(self, node: int, **settings: object) -> Process:
        """Start a machine."""
        place = {"nodes": 2, "node": f"trainer-{node}", "meet_address": self._meet}
        return self.training.start_rank(**place, ranks=RANKS, restart=True, **settings)

    def ranks(self, node: int) -> Sequence[int]:
        """Process ids of a machine's ranks; none while they are not all there."""
        with ExitStack() as stack:
            stack.push(lambda kind, *_: kind in (FileNotFoundError, ProcessLookupError))
            for starter in rank_groups(self.machines[node].pid):
                if len(found := children(starter)) == RANKS:
                    return found
        return []


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("nodes")
    found = Machines(write_tiny_model(folder / "model"), folder)
    with found.training:
        yield found


def train(address: str, at: dict[int, Callable[[], object]] | None = None) -> list[str]:
    """Losses and gradient norms of a new model, in full; `at` some steps something happens."""
    service = tinsmith.ServiceClient(base_url=address)
    (base_model,) = service.get_server_capabilities().supported_models
    client = service.create_lora_training_client(base_model.model_name, rank=4, seed=7).result(120)
    said = []
    for step in range(STEPS):
        computed = client.forward_backward(batch(step), "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-2))
        if at and step in at:
            at[step]()
        metrics = {**computed.result(120).metrics, **stepped.result(120).metrics}
        said += [metrics["loss:sum"].hex(), metrics["grad_norm:last"].hex()]
    return said


def kill_rank(machines: Machines, node: int) -> None:
    """Kill one of a machine's ranks; returns when those of both machines are others."""
    before = [*machines.ranks(0), *machines.ranks(1)]
    assert len(before) == 2 * RANKS
    os.kill(machines.ranks(node)[1], signal.SIGKILL)
    until_gone(before)


def replace(machines: Machines, node: int) -> None:
    """Kill a machine and start it anew; returns when the ranks of both are gone."""
    before = [*machines.ranks(0), *machines.ranks(1)]
    machines.machines[node].kill()
    until_gone(before)
    machines.machines[node] = machines.start(node)


def test_what_happens_to_one_machine_changes_no_bit(machines: Machines) -> None:
    """A rank of the second dies, then the first is gone."""
    undisturbed = train(machines.address)
    machines.machines[0].until(lambda: machines.ranks(0) and machines.ranks(1))
    happens: dict[int, Callable[[], object]] = {
        1: lambda: kill_rank(machines, 1),
        3: lambda: replace(machines, 0),
    }
    assert train(machines.address, happens) == undisturbed
    for machine in machines.machines.values():
        assert not machine.says("Traceback")


def test_a_machine_ends_politely(machines: Machines) -> None:
    """Its ranks too, and the other machine waits for it to come back."""
    machines.machines[1].until(lambda: machines.ranks(1))
    ranks = machines.ranks(1)
    machines.machines[1].signal(signal.SIGTERM)
    assert machines.machines[1].wait() == 128 + signal.SIGTERM
    until_gone(ranks)
    machines.machines[1] = machines.start(1)
    assert train(machines.address)


def test_machines_that_are_set_in_another_way_are_no_group(machines: Machines) -> None:
    """Each would compute other data than the others believe; they are one once they are alike."""
    machines.machines[1].kill()
    machines.machines[1] = machines.start(1, share_prefixes=False)
    machines.machines[1].until(
        lambda: machines.machines[1].says(
            "must be set alike: share_prefixes is False here and True on rank 0"
        )
    )
    machines.machines[1].kill()
    machines.machines[1] = machines.start(1)
    assert train(machines.address)
