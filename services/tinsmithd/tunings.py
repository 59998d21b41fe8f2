"""The ways to train a base model, one class each: all that differs between them, as plain values.

What needs more than plain values asks a tuning what it is, never which: `convert.types` has its
messages, `modeling.weights` what of a model is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

RANK_MAX = 1 << 20
"""No tensors of a larger one can be there; who knows what is trained here bounds it further."""


EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Parameters that hold the weights of all experts, as transformers names them."""


def _between(low: int, high: int, *, is_new: bool = False) -> Mapping[str, int]:
    """The range of a whole number, for who reads it from a file; files of earlier releases lack
    what is new, and mean its default."""
    return {"low": low, "high": high, "is_new": is_new}


@dataclass(frozen=True)
class Tuning:
    """How a model is trained. Its fields are settings: bool, int with a range, or float above 0.

    Attributes:
        kind: Its name in files and records.
        noun: What a checkpoint of it holds, for a person.
        is_adapter: Whether what is trained stands beside the base model, which stays as it is: then
            many models share the ranks, and a checkpoint is a PEFT adapter. Else the model is
            alone, and a checkpoint is a Hugging Face folder.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    is_adapter: ClassVar[bool]

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter; 0 where there is none."""
        return 0

    @property
    def expert_adapter_rank(self) -> int:
        """Rank of the adapter on each expert; 0 where there is none."""
        return 0

    @property
    def shape(self) -> "Tuning":
        """The same for all models that can take turns in one place on a device."""
        return self

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """What the configuration file of a checkpoint must say."""
        return {}

    def on_base(self, active_expert_count: int) -> "Tuning":
        """What a new model trains where a setting is left to its base.

        Args:
            active_expert_count: Experts of the base that a token passes through; 0 without any.
        """
        return self

    def problem(self) -> str:
        """What is wrong with the settings together; empty where nothing is."""
        return ""

    def mismatch(self, other: "Tuning") -> str:
        """Why a model of this tuning cannot take the state of another; empty where it can."""
        if self.kind != other.kind:
            return f"the checkpoint holds {other.noun}, this model trains {self.noun}"
        return ""

    def to_document(self) -> dict[str, Any]:
        """One entry of a JSON document: its kind, with its settings."""
        return {self.kind: dict(vars(self))}


@dataclass(frozen=True)
class LoraConfig(Tuning):
    """Shape of a LoRA adapter; the update is `(alpha / rank) * B @ A` (Hu et al. 2021).

    An expert has an adapter of rank `expert_rank`, whose update is scaled by that one. 0 stands for
    `rank`, which all adapters of experts had before there was this setting; a new model has
    `on_base`'s.
    """

    kind: ClassVar[str] = "lora"
    noun: ClassVar[str] = "a LoRA adapter"
    is_adapter: ClassVar[bool] = True

    rank: int = field(default=32, metadata=_between(1, RANK_MAX))
    alpha: float = 32.0
    seed: int = field(default=0, metadata=_between(-(1 << 63), (1 << 64) - 1))
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expert_rank: int = field(default=0, metadata=_between(0, RANK_MAX, is_new=True))

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter."""
        return self.rank

    @property
    def expert_adapter_rank(self) -> int:
        """Rank of the adapter on each expert, if there are experts."""
        return self.expert_rank or self.rank

    def on_base(self, active_expert_count: int) -> "LoraConfig":
        """Share the rank out among the experts that a token passes through (ADR 26)."""
        if self.expert_rank or not (self.train_mlp and active_expert_count):
            return self
        return replace(self, expert_rank=max(1, self.rank // active_expert_count))

    @property
    def shape(self) -> "LoraConfig":
        """All but the seed, which only says how an adapter begins."""
        return replace(self, seed=0)

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """PEFT's names of rank and alpha, and of the rank of experts where it is another one."""
        entries: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha}
        if self.expert_adapter_rank != self.rank:
            entries["rank_pattern"] = dict.fromkeys(EXPERT_PARAMETERS, self.expert_rank)
        return entries

    def problem(self) -> str:
        """An adapter stands on something, and on an expert with no more than its rank."""
        if self.expert_rank > self.rank:
            return f"expert_rank {self.expert_rank} is above rank {self.rank}"
        if self.train_attn or self.train_mlp or self.train_unembed:
            return ""
        return "one of train_attn, train_mlp, train_unembed must be true"

    def mismatch(self, other: Tuning) -> str:
        """Ranks and alpha must be the same; shapes of tensors say the rest."""
        if not isinstance(other, LoraConfig):
            return super().mismatch(other)
        for name in ("rank", "alpha", "expert_adapter_rank"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                what = name.replace("_", " ")
                return f"the checkpoint has {what} {theirs:g}, this model {ours:g}"
        return ""


@dataclass(frozen=True)
class FullConfig(Tuning):
    """Train every weight of the base model, without an adapter (full fine-tuning)."""

    kind: ClassVar[str] = "full"
    noun: ClassVar[str] = "all weights"
    is_adapter: ClassVar[bool] = False


TUNINGS: Mapping[str, type[Tuning]] = {cls.kind: cls for cls in (FullConfig, LoraConfig)}
"""All of them, by kind."""


def from_document(document: Mapping[str, Any]) -> Tuning:
    """Read what `to_document` wrote into a document, which may have other entries.

    Raises:
        KeyError: There is no tuning in it.
        TypeError: Its settings are not those of its kind.
    """
    for kind, tuning in TUNINGS.items():
        if kind in document:
            return tuning(**document[kind])
    raise KeyError("a tuning")
