"""How a call was computed: what it takes to compute the same bits again."""

import base64
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

CLOSE_REL, CLOSE_ABS = 1e-2, 1e-3
"""How far metrics may differ on ranks that add up in another order each time: half-precision
rounding, grown over the calls since a snapshot. A sum over tokens may differ by `CLOSE_ABS` for
each of them: advantages of both signs make one near 0 of parts that are not."""


_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True)
class Composition:
    """How a call was computed.

    Attributes:
        identity: That of the rank group, see `RankGroup.identity`.
        batch_sizes: Number of data in each batch of the call.
        batches: The engine's composition of each batch.
        metrics: What the call gave, to compare with on ranks that do not repeat their bits.
    """

    identity: Mapping[str, str]
    batch_sizes: Sequence[int] = ()
    batches: Sequence[bytes] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The form in which the journal keeps it. Its keys are older than these names."""
        values = {
            "identity": dict(self.identity),
            "counts": list(self.batch_sizes),
            "plans": [base64.b64encode(batch).decode() for batch in self.batches],
            "metrics": dict(self.metrics),
        }
        return _json(values).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Composition":
        """Read what `encode` wrote."""
        values = json.loads(data)
        batches = [base64.b64decode(batch) for batch in values["plans"]]
        return cls(values["identity"], values["counts"], batches, values.get("metrics", {}))


def differing_keys(
    ours: Mapping[str, str], theirs: Mapping[str, str], keys: Collection[str] = ()
) -> Sequence[str]:
    """The keys in which two identities differ, among some keys or all."""
    found = sorted(keys or {*ours, *theirs})
    return [key for key in found if ours.get(key) != theirs.get(key)]


def repeats_bits(identity: Mapping[str, str]) -> bool:
    """Whether ranks give the same bits each time: those on CPUs, and others that say so."""
    return identity.get("device", "cpu") == "cpu" or identity.get("deterministic") == "True"


def are_close(ours: Mapping[str, float], theirs: Mapping[str, float], tokens: int) -> bool:
    """Whether two sets of metrics are the same but for rounding.

    Args:
        ours: Metrics, named `name:reduction`.
        theirs: The others.
        tokens: Number of tokens of the call; 0 where it has no data.
    """

    def near(name: str, value: float) -> bool:
        parts = max(tokens, 1) if name.endswith(":sum") else 1
        return math.isclose(value, theirs[name], rel_tol=CLOSE_REL, abs_tol=CLOSE_ABS * parts)

    return ours.keys() == theirs.keys() and all(near(*metric) for metric in ours.items())
