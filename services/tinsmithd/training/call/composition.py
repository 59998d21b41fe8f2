"""How a call was computed: what it takes to compute the same bits again."""

import base64
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

CLOSE_REL, CLOSE_ABS = 1e-2, 1e-3
"""How far metrics may be apart on ranks that add up in another order each time: half-precision
rounding, grown over the calls since a snapshot."""


@dataclass(frozen=True)
class Composition:
    """How a call was computed.

    Attributes:
        identity: Of the rank group, see `Trainer.identity`.
        counts: Data of each part of the call.
        plans: The engine's plan of each part.
        metrics: What it gave, for ranks that do not give the same bits twice.
    """

    identity: Mapping[str, str]
    counts: Sequence[int] = ()
    plans: Sequence[bytes] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Write it down."""
        plans = [base64.b64encode(plan).decode() for plan in self.plans]
        values = {
            "identity": dict(self.identity),
            "counts": list(self.counts),
            "plans": plans,
            "metrics": dict(self.metrics),
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Composition":
        """Read what `encode` wrote."""
        values = json.loads(data)
        plans = [base64.b64decode(plan) for plan in values["plans"]]
        return cls(values["identity"], values["counts"], plans, values.get("metrics", {}))


def differing(
    ours: Mapping[str, str], theirs: Mapping[str, str], keys: Collection[str] = ()
) -> Sequence[str]:
    """The keys in which two identities differ, among some keys or all."""
    found = sorted(keys or {*ours, *theirs})
    return [key for key in found if ours.get(key) != theirs.get(key)]


def are_close(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether two sets of metrics are the same but for rounding."""
    return ours.keys() == theirs.keys() and all(
        math.isclose(value, theirs[name], rel_tol=CLOSE_REL, abs_tol=CLOSE_ABS)
        for name, value in ours.items()
    )
