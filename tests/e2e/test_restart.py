"""Processes die: what was done goes on bit for bit; where nothing is kept the user is told."""

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import programs
import tinsmith
from clusters import RunningCluster, children, free_ports, rank_groups, until_gone
from faults.processes import Training
from tinsmith import types
from tinsmithd.processes.template.client import SOCKET_VARIABLE

STEPS = 4
SEQUENCES = [[10, 20, 30, 40, 50, 60], [7, 8, 9, 10]]


def data(step: int) -> list[types.Datum]:
    return [
        types.Datum(
            types.ModelInput.from_ints(tokens[:-1]),
            {
                "target_tokens": np.array(tokens[1:]),
                "weights": np.full(len(tokens) - 1, 1 + step, np.float32),
            },
        )
        for tokens in SEQUENCES
    ]


def adam(step: int) -> types.AdamParams:
    return types.AdamParams(learning_rate=1e-2 / (1 + step), weight_decay=0.01)


def train(client: tinsmith.TrainingClient, first: int, last: int) -> list[object]:
    """Steps of different learning rates; returns everything that came back."""
    seen: list[object] = []
    for step in range(first, last):
        result = client.forward_backward(data(step), "cross_entropy").result()
        seen.append([np.asarray(o["logprobs"]).tolist() for o in result.loss_fn_outputs])
        seen.append(client.optim_step(adam(step)).result().metrics)
    return seen


@pytest.mark.parametrize("engine", ["deepspeed", "reference"])
def test_saved_killed_started_loaded_it_goes_on_bit_identically(
    tiny_model: Path, tmp_path: Path, engine: str
) -> None:
    """kill -9 to every process after a save with optimizer; then as if nothing had happened."""
    with RunningCluster(tiny_model, tmp_path, engine=engine) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        client = service.create_lora_training_client(cluster.base_model, rank=4, seed=1).result()
        train(client, 0, STEPS)
        path = client.save_state("middle").result().path
        undisturbed = train(client, STEPS, 2 * STEPS)
        cluster.kill()
    with RunningCluster(tiny_model, tmp_path, engine=engine) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        assert train(resumed, STEPS, 2 * STEPS) == undisturbed
        # The weights alone are another run: moments start anew.
        anew = service.create_training_client_from_state(path).result()
        assert train(anew, STEPS, 2 * STEPS) != undisturbed


def two_models(service: tinsmith.ServiceClient, base_model: str) -> list[tinsmith.TrainingClient]:
    """Two that begin alike."""
    return [
        service.create_lora_training_client(base_model, rank=2, seed=1).result() for _ in range(2)
    ]


def kill_a_rank(cluster: RunningCluster, rank: int = 0) -> None:
    os.kill(cluster.rank_pids()[rank], signal.SIGKILL)


def test_a_killed_rank_comes_back_with_its_models(tiny_model: Path, tmp_path: Path) -> None:
    """The user does nothing, sees no error, and gets the numbers of an undisturbed run."""
    with RunningCluster(tiny_model, tmp_path) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        made = two_models(service, cluster.base_model)
        undisturbed = train(made[0], 0, 2 * STEPS)
        seen = train(made[1], 0, STEPS)
        kill_a_rank(cluster)
        seen += train(made[1], STEPS, 2 * STEPS)
        assert seen == undisturbed


@pytest.mark.parametrize("there", [True, False])
def test_a_template_of_its_own_is_a_help_and_no_more(
    tiny_model: Path, tmp_path: Path, there: bool
) -> None:
    """As in production: what ranks are forked from dies, and they with it, or was never there; the
    user sees no error and gets the numbers of an undisturbed run."""
    template = "" if there else str(tmp_path / "absent")
    ranks = {"spawn_ranks": 1, "spawn_base_model": tiny_model, "spawn_threads": 1}
    with (
        programs.environment(**{SOCKET_VARIABLE: template}),
        Training(tiny_model, tmp_path, **ranks) as training,
    ):
        service = tinsmith.ServiceClient(base_url=training.address)
        made = two_models(service, tiny_model.name)
        undisturbed = train(made[0], 0, 2 * STEPS)
        seen = train(made[1], 0, STEPS)
        pid = training.server.pid
        (parent,) = children(pid)
        old = rank_groups(pid)
        assert (list(old) == [parent]) is not there
        os.kill(parent, signal.SIGKILL)
        seen += train(made[1], STEPS, 2 * STEPS)
        assert seen == undisturbed
        until_gone([parent, *old])
        assert training.server.says("a program is not forked") is not there


def test_a_cluster_that_is_killed_whole_goes_on_under_its_users(
    tiny_model: Path, tmp_path: Path
) -> None:
    """kill -9 to every process, then `tinsmith up` on the same folder: the same clients, which were
    never told, train on, and gradients that waited for a step still wait for it."""
    ports = free_ports()
    with RunningCluster(tiny_model, tmp_path, port=ports) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        made = two_models(service, cluster.base_model)
        undisturbed = train(made[0], 0, 2 * STEPS)
        seen = train(made[1], 0, STEPS)
        half = made[1].forward_backward(data(STEPS), "cross_entropy").result()
        seen.append([np.asarray(o["logprobs"]).tolist() for o in half.loss_fn_outputs])
        rest = service.create_rest_client()
        asked = [rest.get_training_run(m.model_id).result().last_request_time for m in made]
        killed = datetime.now(UTC)
        cluster.kill()
    with RunningCluster(tiny_model, tmp_path, port=ports):
        # What people see of a model is of its calls, not of the restart.
        for model, before in zip(made, asked, strict=True):
            run = rest.get_training_run(model.model_id).result()
            assert before <= run.last_request_time <= killed
        seen.append(made[1].optim_step(adam(STEPS)).result().metrics)
        seen += train(made[1], STEPS + 1, 2 * STEPS)
        assert seen == undisturbed


def test_without_durability_a_killed_rank_takes_its_models_along_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DATA_LOSS for what was in memory, never a wrong number; new models train at once."""
    monkeypatch.setenv("TINSMITH_TRAINING_DURABILITY", "none")
    with RunningCluster(tiny_model, tmp_path) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        client = service.create_lora_training_client(cluster.base_model, rank=2).result()
        train(client, 0, 1)
        saved = client.save_state("kept").result().path
        kill_a_rank(cluster)
        with pytest.raises(tinsmith.DataLossError) as loss:
            _train_until_it_fails(client)
        assert loss.value.reason == "MODEL_LOST"
        # The client waits until the ranks are back; nobody did anything by hand.
        again = service.create_training_client_from_state_with_optimizer(saved).result(60)
        assert train(again, 1, 2)


@pytest.mark.timeout(240)
def test_two_ranks_train_as_one_and_come_back_when_one_is_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The same numbers to 1e-4, with fewer data than ranks too; kill -9 of either rank ends the
    group, and the new one goes on with what the old one had (row 10)."""
    seen = []
    for ranks in (1, 2):
        with RunningCluster(tiny_model, tmp_path / str(ranks), ranks=ranks) as cluster:
            service = tinsmith.ServiceClient(base_url=cluster.address)
            model = service.create_lora_training_client(cluster.base_model, rank=4, seed=1).result()
            losses = []
            for step in range(4):
                count = 1 + step % 2
                result = model.forward_backward(data(0)[:count], "cross_entropy").result()
                losses.append(result.loss)
                if ranks == 2 and step in (1, 2):
                    kill_a_rank(cluster, rank=step - 1)
                if step == 1:
                    model.optim_step(types.AdamParams(learning_rate=1e-2, eps=0.1)).result()
            losses.append(model.forward(data(0), "cross_entropy").result().loss)
            seen.append(losses)
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def _train_until_it_fails(client: tinsmith.TrainingClient) -> None:
    for step in range(1000):
        train(client, step, step + 1)
        time.sleep(0.05)


def test_a_base_model_that_is_not_there_stops_the_cluster_with_a_sentence(tmp_path: Path) -> None:
    """`tinsmith up` says what is wrong instead of waiting for ever."""
    with pytest.raises(Exception, match="server cannot start") as failure:
        RunningCluster(tmp_path / "absent", tmp_path / "data")
    assert any("cannot load base model" in note for note in failure.value.__notes__)
