"""What a release wrote and what its servers answered, for the releases after it.

    tests/data/<release>/cluster.tar.xz   base model, data folders, file of keys, `expected.json`

A cluster is killed with SIGKILL while gradients are pending, a call is written down that no ranks
computed, and one waits for the number before its own. What a model gives that nothing happens to
stands in `expected.json`.
"""

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import tinsmith
from faults.recovering import data, values
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith._convert import loss_fn_to_pb, requests_of

DATA = Path(__file__).parents[1] / "data"
BASE = "recorded-llama"
ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.1)
STEPS = 5
SETTINGS = {"snapshot_steps": 2, "replay_check": "close", "model_idle_ttl_s": 1e10}
"""Another machine than that of the recording comes close, and nobody called since then."""


def processor() -> str:
    """The processor, as far as bits depend on it."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        kept = [line for line in first if line.startswith(("model", "cpu family", "flags"))]
        return hashlib.sha256("\n".join(kept).encode()).hexdigest()
    return ""


def plain(found: Any) -> Any:
    """What a call answered, as JSON: metrics, and logprobs as hex digits of float32."""
    metrics = found[1] if isinstance(found, tuple) else found
    outputs = [each.hex() for each in found[0]] if isinstance(found, tuple) else []
    return {"metrics": {k: float(v).hex() for k, v in metrics.items()}, "logprobs": outputs}


def close(found: Any, expected: Any) -> bool:
    """Whether two of these are the same but for rounding."""
    if found.keys() != expected.keys() or found["metrics"].keys() != expected["metrics"].keys():
        return False
    pairs = [
        (
            np.frombuffer(bytes.fromhex(ours), np.float32),
            np.frombuffer(bytes.fromhex(x), np.float32),
        )
        for ours, x in zip(found["logprobs"], expected["logprobs"], strict=True)
    ]
    numbers = [
        (float.fromhex(value), float.fromhex(expected["metrics"][name]))
        for name, value in found["metrics"].items()
    ]
    return all(np.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in [*pairs, *numbers])


# --- calls that say when they are written down --------------------------------------------------


class Raw:
    """Numbered calls of a model by plain stubs."""

    def __init__(self, address: str, model_id: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = pb.TrainingServiceStub(self._channel)
        self._model_id = model_id

    def next_seq_id(self) -> int:
        """The number of the next call."""
        request = pb.GetModelRequest(model_id=self._model_id)
        return int(self._stub.GetModel(request, timeout=30).model.next_seq_id)

    def hand_in(self, seq_id: int, seed: int) -> None:
        """Send a `forward_backward`, and wait until it is written down and no longer."""
        loss = loss_fn_to_pb("cross_entropy", None)
        requests = requests_of(pb.ForwardBackwardRequest, data(seed), loss)
        requests[0].model_id, requests[0].seq_id = self._model_id, seq_id
        requests[0].acknowledge = True
        call = self._stub.ForwardBackward(iter(requests))
        for response in call:
            if response.accepted:
                return
        raise AssertionError("it was not accepted")

    def step(self, seq_id: int) -> Any:
        """Make a step."""
        adam = pb.AdamParams(learning_rate=1e-2, weight_decay=0.1)
        request = pb.OptimStepRequest(model_id=self._model_id, seq_id=seq_id, adam_params=adam)
        return plain(dict(self._stub.OptimStep(request, timeout=60).metrics))

    def answer(self, seq_id: int) -> Any:
        """The answer of a `forward_backward` that was handed in."""
        request = pb.GetAnswerRequest(model_id=self._model_id, seq_id=seq_id)
        outputs: list[bytes] = []
        metrics: dict[str, float] = {}
        for response in self._stub.GetAnswer(request, timeout=60):
            part = response.forward_backward
            outputs += [output.loss_fn_outputs["logprobs"].data for output in part.outputs]
            metrics.update(part.metrics)
        return plain((outputs, metrics))

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def trained(service: tinsmith.ServiceClient, seed: int) -> tuple[tinsmith.TrainingClient, Any]:
    """A model after some steps, saved, with gradients pending; and what its calls answered."""
    model = service.create_lora_training_client(BASE, rank=4, seed=seed).result(90)
    seen = []
    for step in range(STEPS):
        seen.append(model.forward_backward(data(step), "cross_entropy"))
        seen.append(model.optim_step(ADAM))  # type: ignore[arg-type]
    found = [plain(values(future.result(90))) for future in seen]
    model.save_state("kept").result(90)
    model.save_weights_for_sampler("kept").result(90)
    found.append(plain(values(model.forward_backward(data(STEPS), "cross_entropy").result(90))))
    return model, found


def rest(model: tinsmith.TrainingClient) -> Sequence[Any]:
    """What the calls after those of `trained` answer, and those after the checkpoint is loaded."""
    seen = []
    for step in (STEPS + 1, STEPS + 2):
        seen.append(plain(values(model.forward_backward(data(step), "cross_entropy").result(90))))
        seen.append(plain(values(model.optim_step(ADAM).result(90))))
    return seen


def from_checkpoint(model: tinsmith.TrainingClient, path: str) -> Sequence[Any]:
    """What a step over the saved state answers."""
    model.load_state_with_optimizer(path).result(90)
    result = model.forward_backward(data(9), "cross_entropy").result(90)
    return [plain(values(result)), plain(values(model.optim_step(ADAM).result(90)))]


# --- the file -----------------------------------------------------------------------------------


def write(release: str, folder: Path, expected: Mapping[str, Any]) -> Path:
    """Pack a recording: the folder has `BASE`, `data` and `keys.json`."""
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))
    place = DATA / release / "cluster.tar.xz"
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w:xz", preset=9) as archive:
        for name in (BASE, "data", "keys.json", "expected.json"):
            archive.add(folder / name, name, filter=_nobodys)
    return place


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(member.name).name
    if name in ("link.secret", "lock") or name.endswith("-shm"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack(release: str, folder: Path) -> Any:
    """Unpack a recording; returns what is expected."""
    with tarfile.open(DATA / release / "cluster.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return json.loads((folder / "expected.json").read_text())


def releases() -> Sequence[str]:
    """Those of which there is a recording."""
    return sorted(path.parent.name for path in DATA.glob("*/cluster.tar.xz"))
