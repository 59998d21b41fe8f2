"""Back up, lose the machine, restore on another one: by docs/operations.md alone."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

import tinsmith
from clusters import RunningCluster, free_ports
from commands import tinsmith as command
from faults.recovering import Seen, data, model_of, train, values
from releases import recorded
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.errors import FailedPreconditionError
from wire import reason_and_field

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
DATA = Path("tinsmith-data")
BLOCK = r"<!-- run: {} -->\n\n```sh\n(.*?)```"
PROMPT = types.ModelInput.from_ints([5, 200, 31])


def run_block(name: str, folder: Path) -> str:
    """Run the commands that the page shows, in a folder; returns what they printed."""
    found = re.search(BLOCK.format(name), DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", found[1]],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sampled(model: tinsmith.TrainingClient, path: str) -> Any:
    """What a saved checkpoint samples."""
    params = types.SamplingParams(max_tokens=8, seed=2)
    sampler = model.create_sampling_client(path)
    return sampler.sample(PROMPT, 1, params).result(60).sequences[0].tokens


def save(model: tinsmith.TrainingClient, name: str) -> str:
    """Save the weights; returns the path."""
    return str(model.save_weights_for_sampler(name).result(60).path)


ADAM = types.AdamParams(learning_rate=1e-2)
BEFORE = 4
"""Steps before the checkpoint; then the model is trained all the time."""


class Busy:
    """Trains a model in a thread, step by step, until it is told to stop."""

    def __init__(self, model: tinsmith.TrainingClient) -> None:
        self.seen: Seen = []
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        step = BEFORE
        while not self._stop.is_set():
            self.seen += train(self._model, step, step + 1)
            step += 1

    def until(self, steps: int) -> None:
        """Wait until it has made so many steps."""
        while len(self.seen) < 2 * steps:
            self._thread.join(0.01)
            assert self._thread.is_alive()

    def end(self) -> None:
        """Stop after the step under way."""
        self._stop.set()
        self._thread.join()


def calls_in(address: str, model_id: str, most: int) -> int:
    """How many calls a restored model has: the newest of those whose answers it has."""
    found = 0
    with grpc.insecure_channel(address) as channel:
        stub = pb.TrainingServiceStub(channel)
        for seq_id in range(1, most + 1):
            request = pb.GetAnswerRequest(model_id=model_id, seq_id=seq_id)
            with contextlib.suppress(grpc.RpcError):
                list(stub.GetAnswer(request, timeout=60))
                found = seq_id
        with pytest.raises(grpc.RpcError) as lost:
            list(stub.GetAnswer(pb.GetAnswerRequest(model_id=model_id, seq_id=found + 1)))
    assert reason_and_field(lost.value)[0] == "MODEL_RESTORED"
    return found


@pytest.mark.timeout(240)
def test_a_cluster_is_restored_as_the_page_says(tiny_model: Path, tmp_path: Path) -> None:
    """Models go on from the back-up, which was made while they were trained, with the bits of a
    model that nothing happened to; whoever was ahead of it hears that, and never goes on as if
    nothing had happened."""
    port = free_ports()
    with RunningCluster(tiny_model, tmp_path / DATA, port=port) as cluster:
        service = tinsmith.ServiceClient(base_url=cluster.address)
        model = model_of(service)
        seen = train(model, 0, BEFORE)
        path = save(model, "kept")
        tokens = sampled(model, path)
        busy = Busy(model)
        busy.until(3)
        assert "is whole" in run_block("back up", tmp_path)
        busy.until(len(busy.seen) // 2 + 3)
        busy.end()
        late = model_of(service)
        train(late, 0, 1)
        cluster.kill()
    shutil.move(tmp_path / DATA, tmp_path / "lost")
    assert "restored 1 models" in run_block("restore", tmp_path)
    with RunningCluster(tiny_model, tmp_path / DATA, port=port) as cluster:
        for client, reason in ((model, "MODEL_RESTORED"), (late, "MODEL_NOT_FOUND")):
            with pytest.raises(tinsmith.TinsmithError) as ahead:
                client.optim_step(ADAM).result(60)
            assert ahead.value.reason == reason
        service = tinsmith.ServiceClient(base_url=cluster.address)
        again = service.get_training_client(model.model_id).result(60)
        acknowledged = 2 * BEFORE + len(busy.seen)
        # The save is one of them.
        made = calls_in(cluster.address, model.model_id, acknowledged + 1) - 1
        assert 2 * (BEFORE + 3) <= made < acknowledged
        step, half = divmod(made, 2)
        right = train(model_of(service), 0, step + 3)
        assert (seen + busy.seen)[:made] == right[:made]
        now = [values(again.optim_step(ADAM).result(60))] if half else []
        assert now + train(again, step + half, step + 3) == right[made:]
        assert sampled(again, path) == tokens
        with pytest.raises(FailedPreconditionError) as still_ahead:
            model.forward_backward(data(7), "cross_entropy").result(60)
        assert still_ahead.value.reason == "MODEL_RESTORED"


# --- what is wrong with a back-up ----------------------------------------------------------------


@pytest.fixture(scope="module")
def backed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cluster's data, of the first release, and a back-up of it."""
    folder = tmp_path_factory.mktemp("backed-up")
    recorded.unpack("0.1.0", folder)
    made = command(
        "backup", "create", "--data", str(folder / "data"), str(folder / "made"), "--json"
    )
    assert made.status == 0, made.err
    assert made.json["problems"] == []
    assert made.json["models"] == 2
    return folder


def test_every_damage_of_a_back_up_is_found(backed_up: Path, tmp_path: Path) -> None:
    """One flipped bit in any file, or a missing one: `verify` says which, and nothing is restored
    of it."""
    files = [path for path in sorted((backed_up / "made").rglob("*")) if path.is_file()]
    assert len(files) > 6
    for number, file in enumerate(files):
        place = tmp_path / str(number)
        shutil.copytree(backed_up / "made", place)
        broken = place / file.relative_to(backed_up / "made")
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
        verified = command("backup", "verify", str(place))
        assert verified.status == 1, broken
        target = tmp_path / f"restored-{number}"
        restored = command("backup", "restore", "--data", str(target), str(place))
        assert restored.status == 1
        assert not list(target.rglob("journal.sqlite"))
        broken.unlink()
        assert command("backup", "verify", str(place)).status == 1


def test_a_back_up_overwrites_nothing(backed_up: Path, tmp_path: Path) -> None:
    """Neither an earlier one nor the data of a cluster."""
    made, data_folder = str(backed_up / "made"), str(backed_up / "data")
    for line in (("create", "--data", data_folder, made), ("restore", "--data", data_folder, made)):
        done = command("backup", *line, "--json")
        assert done.status == 1
        assert "is not empty" in json.loads(done.err)["error"]["message"]
    none = command("backup", "verify", str(tmp_path))
    assert none.status == 1
    assert "is no back-up" in none.err
    absent = command("backup", "create", "--training-folder", str(tmp_path), str(tmp_path / "x"))
    assert absent.status == 1
    assert "is no data_folder of a Training server" in absent.err
    assert not (tmp_path / "x").exists()


def test_parts_are_backed_up_and_restored_by_themselves(backed_up: Path, tmp_path: Path) -> None:
    """As where each server has a machine; keys go with either."""
    keys = tmp_path / "keys.json"
    assert command("keys", "create", "--file", str(keys)).status == 0
    training, checkpoints = tmp_path / "training", tmp_path / "checkpoints"
    folder = backed_up / "data"
    first = ("--training-folder", str(folder / "training"), "--keys", str(keys), str(training))
    second = ("--checkpoint-folder", str(folder / "checkpoints"), str(checkpoints))
    for options in (first, second):
        assert command("backup", "create", *options).status == 0
    target = tmp_path / "new"
    target.mkdir()
    parts = ("--training-folder", str(target / "t"), "--keys", str(target / "keys.json"))
    assert command("backup", "restore", *parts, str(training)).status == 0
    assert (target / "keys.json").read_bytes() == keys.read_bytes()
    assert (target / "keys.json").stat().st_mode & 0o077 == 0
    assert (target / "t" / "journal.sqlite").exists()
    missing = command("backup", "restore", "--training-folder", str(target / "u"), str(checkpoints))
    assert missing.status == 1
    assert "has no training" in missing.err
