"""What the ranks did for this process: plain numbers that only rise, for `metrics` to show."""

from dataclasses import dataclass, field
from enum import StrEnum

from tinsmithd.mismatch import Mismatch
from tinsmithd.owners import DEFAULT_OWNER
from tinsmithd.tenants import TenantCounter


class WorkKind(StrEnum):
    """Why tokens were computed. REPLAY: once more after a crash, with the backward pass or not."""

    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    REPLAY = "replay"


@dataclass
class Counts:
    """Since this process began.

    Attributes:
        rank_groups: Rank groups that attached.
        tokens: Tokens computed, by kind.
        engine_s: Seconds that the engine took for them, by kind.
        flops: Operations that those tokens take, without replays, see `sizes.work`.
        of_tenants: Tokens computed, without replays, by tenant.
        mismatch: Of all sampled tokens that were computed, without replays.
        steps: Optimizer steps made, without replays.
        restored: Times that a model was brought back to ranks.
        suspended: Times that a model left the ranks for another one.
        snapshots, snapshots_failed: Snapshots that were taken, and that could not be.
        snapshots_damaged: Snapshots that were found damaged when they were needed.
        unkept_since_s: Of models with steps that no snapshot has, by their ids: since when, by
            `time.monotonic`.
    """

    rank_groups: int = 0
    tokens: dict[WorkKind, int] = field(default_factory=lambda: dict.fromkeys(WorkKind, 0))
    engine_s: dict[WorkKind, float] = field(default_factory=lambda: dict.fromkeys(WorkKind, 0.0))
    flops: int = 0
    of_tenants: TenantCounter = field(default_factory=TenantCounter)
    mismatch: Mismatch = field(default_factory=Mismatch)
    steps: int = 0
    restored: int = 0
    suspended: int = 0
    snapshots: int = 0
    snapshots_failed: int = 0
    snapshots_damaged: int = 0
    unkept_since_s: dict[str, float] = field(default_factory=dict)

    def computed(
        self,
        kind: WorkKind,
        tokens: int,
        engine_s: float,
        mismatch: Mismatch | None = None,
        *,
        flops: int = 0,
        owner: str = DEFAULT_OWNER,
    ) -> None:
        """The ranks computed a batch of somebody's."""
        self.tokens[kind] += tokens
        self.engine_s[kind] += engine_s
        if kind is WorkKind.REPLAY:
            return
        self.flops += flops
        self.of_tenants.add(owner, tokens)
        if mismatch is not None:
            self.mismatch.include(mismatch)
