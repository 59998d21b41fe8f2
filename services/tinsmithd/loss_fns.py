"""The built-in losses, one class each, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LossFn:
    """A built-in loss. Subclasses are the six of them; fields are their configuration."""

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    """Names of the `loss_fn_inputs` that it needs, all of them and no others."""
    ones: ClassVar[tuple[str, ...]] = ()
    """Those of them that may be left out, and are all 1 then."""


@dataclass(frozen=True)
class CrossEntropy(LossFn):
    """`sum(-logprobs * weights)`; the only loss that takes `(N, K)` targets."""

    name: ClassVar[str] = "cross_entropy"
    inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "weights")
    ones: ClassVar[tuple[str, ...]] = ("weights",)


@dataclass(frozen=True)
class ImportanceSampling(LossFn):
    """`-sum(r * A)` with `r = exp(logprob - sampling logprob)`."""

    name: ClassVar[str] = "importance_sampling"
    inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "logprobs", "advantages")


@dataclass(frozen=True)
class Ppo(LossFn):
    """`-sum(min(r * A, clip(r, low, high) * A))`; thresholds are ratios (Schulman et al. 2017)."""

    name: ClassVar[str] = "ppo"
    inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "logprobs", "advantages")
    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2


@dataclass(frozen=True)
class Cispo(LossFn):
    """`-sum(stop_gradient(clip(r, low, high)) * logprob * A)` (MiniMax-M1, 2025)."""

    name: ClassVar[str] = "cispo"
    inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "logprobs", "advantages")
    clip_low_threshold: float = 0.0
    clip_high_threshold: float = 4.0


@dataclass(frozen=True)
class Dro(LossFn):
    """`-sum(logprob * A - beta / 2 * (logprob - sampling logprob)**2)` (Richemond et al. 2024)."""

    name: ClassVar[str] = "dro"
    inputs: ClassVar[tuple[str, ...]] = ("target_tokens", "logprobs", "advantages")
    beta: float = 0.05


@dataclass(frozen=True)
class Gspo(LossFn):
    """PPO with one ratio per sequence: `s = exp(mean over mask of log r)` (Zheng et al. 2025).

    Each token's ratio has the value `s` and the gradient of its own logprob. Tokens with
    `sequence_ratio_mask` 0 stay out of the mean; a datum whose mask is all 0 has `s = 1`.
    """

    name: ClassVar[str] = "gspo"
    inputs: ClassVar[tuple[str, ...]] = (
        "target_tokens",
        "logprobs",
        "advantages",
        "sequence_ratio_mask",
    )
    clip_low_threshold: float = 1 - 3e-4
    clip_high_threshold: float = 1 + 4e-4


LOSSES: Mapping[str, type[LossFn]] = {
    cls.name: cls for cls in (CrossEntropy, ImportanceSampling, Ppo, Cispo, Dro, Gspo)
}
