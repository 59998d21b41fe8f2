"""What simulated ranks compute, and what the oracle expects of them: one specification.

A model's state is a chain of digests, so that an effect that is lost, doubled, or out of order
changes everything after it. Results depend on the composition in which they were
computed, which the ranks draw at random and say with every result.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from tinsmithd.domain import AdamParams

COMPOSITION_BYTES = 3

NORMAL, NON_FINITE, POISON, REFUSED, NO_MEMORY = b"n", b"x", b"p", b"r", b"m"
"""First byte of a datum: what it does to the ranks."""


@dataclass(frozen=True)
class State:
    """A model as the ranks have it."""

    weights: str
    moments: str
    step_count: int = 0
    gradients: str = ""
    non_finite: bool = False


def datum(kind: bytes, seq_id: int, index: int, size: int = 0) -> bytes:
    """A datum of a call, of at least this size."""
    return kind + f"{seq_id}.{index}.".encode().ljust(size - 1, b"-")


def seq_id_of(data: bytes) -> int:
    """The call that a datum belongs to."""
    return int(data[1:].split(b".")[0])


def digest(*parts: object) -> str:
    """Of any values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def number(*parts: object) -> float:
    """A whole number of at most 48 bits that stands for any values."""
    return float(int(digest(*parts), 16))


def fresh(seed: int) -> State:
    """A model from nothing."""
    return State(digest("weights", seed), "")


def output(state: State, loss: bytes, datum: bytes, composition: bytes) -> bytes:
    """The result of one datum."""
    text = digest(state.weights, loss, datum, composition)
    return composition + text.encode()


def composition_of(result: bytes) -> bytes:
    """The composition in which a result was computed."""
    return result[:COMPOSITION_BYTES]


def add_gradient(state: State, datum: bytes, result: bytes) -> State:
    """The state after the way back of one datum."""
    gradients = digest(state.gradients, result)
    bad = state.non_finite or datum[:1] == NON_FINITE
    return replace(state, gradients=gradients, non_finite=bad)


def loss_of(results: Sequence[bytes]) -> float:
    """A metric that adds up."""
    return sum(number(result) % 1000 for result in results)


def compute_metrics(state: State, results: Sequence[bytes]) -> dict[str, float]:
    """Metrics of a compute that left this state."""
    return {"loss:sum": loss_of(results), "gradients:last": number(state.gradients)}


def cleared(state: State) -> State:
    """Without gradients."""
    return replace(state, gradients="", non_finite=False)


def step(state: State, adam: AdamParams) -> tuple[State, dict[str, float]]:
    """One optimizer step; its gradients are finite."""
    moments = digest(state.moments, state.gradients, adam.beta1)
    weights = digest(state.weights, moments, adam.learning_rate)
    after = State(weights, moments, state.step_count + 1)
    metrics = {"step:last": float(after.step_count), "state:last": number(weights, moments)}
    return after, metrics


def files(state: State, optimizer: bool) -> list[tuple[str, bytes]]:
    """State files, in pieces."""
    about = json.dumps({"step_count": state.step_count}).encode()
    pieces = [("adapter", state.weights[:5].encode()), ("adapter", state.weights[5:].encode())]
    pieces.append(("model_state.json", about))
    if optimizer:
        pieces.append(("optimizer", state.moments.encode() or b"-"))
    return pieces


def load(pieces: Sequence[tuple[str, bytes]], optimizer: bool) -> State:
    """The state of `files`."""
    whole: dict[str, bytes] = {}
    for name, data in pieces:
        whole[name] = whole.get(name, b"") + data
    weights = whole["adapter"].decode()
    if not optimizer:
        return State(weights, "")
    moments = whole["optimizer"].decode().replace("-", "")
    return State(weights, moments, json.loads(whole["model_state.json"])["step_count"])


def show(state: State) -> str:
    """For a person."""
    return json.dumps(asdict(state))
