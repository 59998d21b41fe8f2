"""A rank that dies or stands still takes its group down, and the group comes back by itself.

`make test` has one of each kind, `make faults` all.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import programs
import tinsmith
from clusters import RunningCluster, children, free_ports, until_back, until_gone, until_health
from faults.amount import amount
from faults.processes import Process
from tinsmith import tensors, types
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tiny_models import write_tiny_model

TIMEOUT_S = 3
"""How long a rank may be silent in these tests."""


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_TRAINER_COLLECTIVE_TIMEOUT_S", str(TIMEOUT_S))


def make_data(count: int, length: int) -> list[types.Datum]:
    """Random data of one length."""
    rows = np.random.default_rng(0).integers(0, 256, (count, length + 1))
    weights = np.ones(length, np.float32)
    return [
        types.Datum(
            types.ModelInput.from_ints(row[:-1].tolist()),
            {"target_tokens": row[1:], "weights": weights},
        )
        for row in rows
    ]


def assert_trains(address: str) -> None:
    """A new model takes a step in the right direction."""
    service = tinsmith.ServiceClient(base_url=address)
    base_model = service.get_server_capabilities().supported_models[0].model_name
    model = service.create_lora_training_client(base_model, rank=2).result(90)
    before = model.forward_backward(make_data(2, 8), "cross_entropy").result(60).loss
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result(60)
    assert model.forward(make_data(2, 8), "cross_entropy").result(60).loss < before


def long_call(stubs: Cluster) -> Iterator[pb.ForwardBackwardResponse]:
    """The answers of a call that takes long; its first results are there already."""
    lora = pb.LoraConfig(rank=2, seed=1)
    model_id = stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id
    weights = tensors.encode(np.ones(256, "f4"))
    loss_fn = pb.LossFn(cross_entropy=pb.CrossEntropyLoss())
    request = pb.ForwardBackwardRequest(model_id=model_id, loss_fn=loss_fn)
    # Different from their first tokens on: what data begin with is computed once.
    for tokens in np.random.default_rng(1).integers(0, 256, (400, 256)):
        tensor = tensors.encode(tokens)
        request.data.add(
            model_input=pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tensor)]),
            loss_fn_inputs={"target_tokens": tensor, "weights": weights},
        )
    answers = stubs.training.ForwardBackward(iter([request]))
    next(answers)
    return answers


DEATHS = (
    (signal.SIGSTOP, 1, True),
    (signal.SIGSTOP, 0, False),
    *amount((), full=((signal.SIGKILL, 1, True), (signal.SIGSTOP, 1, False))),
)
"""What happens to which rank, and whether in the middle of a call: one group after the other."""


def test_a_group_ends_with_any_of_its_ranks_and_comes_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Health says so both times, nobody of the old group is left, a call that was under way is
    answered, and new models train."""
    with (
        RunningCluster(tiny_model, tmp_path, ranks=2) as cluster,
        connect(cluster.address) as stubs,
    ):
        for signum, rank, under_way in DEATHS:
            old = cluster.rank_pids()
            assert len(old) == 2
            said = len((cluster.logs / "training.log").read_text())
            answers = long_call(stubs) if under_way else iter([])
            with until_back(cluster.address):
                os.kill(old[rank], signum)
            if under_way:
                # Made again by the next group, and the caller waited.
                assert list(answers)[-1].metrics
            until_gone(old)
            assert_trains(cluster.address)
            log = (cluster.logs / "training.log").read_text()[said:]
            if signum == signal.SIGSTOP:
                assert f"rank {1 - rank} ends: rank {rank} gave no sign of life for" in log


def test_computing_for_long_is_no_silence_and_an_orderly_end_is_quiet(tmp_path: Path) -> None:
    """One rank computes for more than twice the timeout, the other waits: both live on. Then
    SIGTERM to the cluster: no rank complains of another one."""
    base_model = write_tiny_model(tmp_path / "long", context_length=2**17)
    with RunningCluster(base_model, tmp_path, ranks=2) as cluster:
        ranks = cluster.rank_pids()
        service = tinsmith.ServiceClient(base_url=cluster.address)
        model = service.create_lora_training_client(cluster.base_model, rank=2).result()
        length, took_s = 2**12, 0.0
        while took_s < 2 * TIMEOUT_S:
            length *= 2
            assert length < 2**17, "this machine is too fast for this test"
            started_s = time.monotonic()
            result = model.forward_backward(make_data(1, length), "cross_entropy").result()
            took_s = time.monotonic() - started_s
            assert len(result.loss_fn_outputs) == 1
        assert cluster.rank_pids() == ranks
    until_gone(ranks)
    log = (cluster.logs / "training.log").read_text()
    assert " ERROR " not in log
    assert "Traceback" not in log


def test_a_rank_that_computes_without_end_ends_its_group_and_the_call_is_made_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heart beats on, and the other one waits in a collective: both say so, and where they are.
    The next group answers, and the caller waited."""
    monkeypatch.setenv("TINSMITH_TRAINER_PROGRESS_TIMEOUT_S", "4")
    monkeypatch.setenv("TINSMITH_FAILPOINTS", "mid_forward:spin@2")
    with RunningCluster(tiny_model, tmp_path, ranks=2) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        model = service.create_lora_training_client(cluster.base_model, rank=2).result(90)
        ranks, data = cluster.rank_pids(), make_data(1, 8)
        losses = [model.forward(data, "cross_entropy").result(60).loss for _ in range(2)]
        assert losses[0] == losses[1]
        until_gone(ranks)
    log = (cluster.logs / "training.log").read_text()
    for rank in range(2):
        assert f"rank {rank} ends: nothing was done for" in log
        assert f"rank {rank}, its last collectives: " in log
    assert "rank 0: compute" in log
    assert "_act < failpoints.py" in log


def test_the_end_of_a_cluster_leaves_no_stopped_rank_behind(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that hears no SIGTERM ends with the others, long before anybody calls it silent."""
    monkeypatch.setenv("TINSMITH_TRAINER_COLLECTIVE_TIMEOUT_S", "600")
    with RunningCluster(tiny_model, tmp_path, ranks=2) as cluster:
        ranks = cluster.rank_pids()
        os.kill(ranks[1], signal.SIGSTOP)
    until_gone(ranks)


# --- more than one node -----------------------------------------------------------------------


class Nodes:
    """A Training server that waits for ranks, and two torchrun agents on loopback."""

    def __init__(self, base_model: Path, folder: Path, *rendezvous: Sequence[str]) -> None:
        self._stack = ExitStack()
        self._folder = folder
        data = folder / "training"
        self.training = self._stack.enter_context(
            Process("training", folder, {"data_folder": data})
        )
        self.address = f"127.0.0.1:{self.training.port}"
        env = programs.variables(
            TINSMITH_TRAINER_TRAINING_TARGET=f"127.0.0.1:{self.training.link_port}",
            TINSMITH_TRAINER_LINK_SECRET_FILE=str(data / "link.secret"),
            TINSMITH_TRAINER_BASE_MODEL=str(base_model),
            TINSMITH_TRAINER_THREADS="1",
            GLOO_SOCKET_IFNAME="lo",
        )
        options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3")
        self.agents = [
            programs.Logged(
                folder / f"agent-{node}.log",
                *("torch.distributed.run", *options, *arguments, "-m", "tinsmithd.trainer"),
                env=env,
            )
            for node, arguments in enumerate(rendezvous)
        ]
        for agent in self.agents:
            self._stack.callback(self._stop, agent)

    def _stop(self, agent: programs.Logged) -> None:
        agent.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.process.wait(20)
        agent.kill()

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by node."""
        return [pid for agent in self.agents for pid in children(agent.pid)]

    def logs(self) -> str:
        """What everybody said."""
        return "\n".join(f"--- {p}\n{p.read_text()}" for p in sorted(self._folder.glob("*.log")))

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._stack.close()
        if error is not None:
            error.add_note(self.logs()[-6000:])


def rendezvous_of(kind: str) -> list[Sequence[str]]:
    """What tells each of the two agents how to find the other."""
    port = free_ports()
    if kind == "static":
        return [
            ("--master-addr=127.0.0.1", f"--master-port={port}", f"--node-rank={node}")
            for node in range(2)
        ]
    endpoint = f"--rdzv-endpoint=127.0.0.1:{port}"
    return [("--rdzv-backend=c10d", endpoint, "--rdzv-id=tinsmith", "--local-addr=127.0.0.1")] * 2


@pytest.mark.parametrize("kind", amount(["c10d"], full=["c10d", "static"]))
def test_two_nodes_are_one_group_and_come_back_when_a_rank_is_killed(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """torchrun's two ways to meet; a rank is killed, in full each of the two."""
    with Nodes(tiny_model, tmp_path, *rendezvous_of(kind)) as nodes:
        until_health(nodes.address, serving=True)
        assert_trains(nodes.address)
        for victim in amount((0,), full=(1, 0)):
            old = nodes.ranks()
            assert len(old) == 2
            with until_back(nodes.address):
                os.kill(old[victim], signal.SIGKILL)
            until_gone(old)
            assert_trains(nodes.address)
        assert [agent.process.poll() for agent in nodes.agents] == [None, None]
