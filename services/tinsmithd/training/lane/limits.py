"""Bounds of one lane."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LaneLimits:
    """The names are those of the settings."""

    lane_calls_max: int
    lane_bytes_max: int
    gap_wait_s_max: float
    answers_kept_max: int
    answer_bytes_kept_max: int
    call_attempts_max: int = 2
    snapshot_idle_s: float = 30.0
