"""The ways to train a base model, one class each: all that differs between them, as plain values.

What needs more than plain values asks a tuning what it is, never which: `convert.types` has its
messages, `modeling.weights` what of a model is trained.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

RANK_MAX = 1 << 20
"""No tensors of a larger one can be there; who knows what is trained here bounds it further."""


def _between(low: int, high: int) -> Mapping[str, int]:
    """The range of a whole number, for who reads it from a file."""
    return {"low": low, "high": high}


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
    def shape(self) -> "Tuning":
        """The same for all models that can take turns in one place on a device."""
        return self

    @property
    def config_entries(self) -> Mapping[str, float]:
        """What the configuration file of a checkpoint must say."""
        return {}

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
        return {self.kind: asdict(self)}


@dataclass(frozen=True)
class LoraConfig(Tuning):
    """Shape of a LoRA adapter; the update is `(alpha / rank) * B @ A` (Hu et al. 2021)."""

    kind: ClassVar[str] = "lora"
    noun: ClassVar[str] = "a LoRA adapter"
    is_adapter: ClassVar[bool] = True

    rank: int = field(default=32, metadata=_between(1, RANK_MAX))
    alpha: float = 32.0
    seed: int = field(default=0, metadata=_between(-(1 << 63), (1 << 64) - 1))
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter."""
        return self.rank

    @property
    def shape(self) -> "LoraConfig":
        """All but the seed, which only says how an adapter begins."""
        return replace(self, seed=0)

    @property
    def config_entries(self) -> Mapping[str, float]:
        """PEFT's names of rank and alpha."""
        return {"r": self.rank, "lora_alpha": self.alpha}

    def problem(self) -> str:
        """An adapter stands on something."""
        if self.train_attn or self.train_mlp or self.train_unembed:
            return ""
        return "one of train_attn, train_mlp, train_unembed must be true"

    def mismatch(self, other: Tuning) -> str:
        """Rank and alpha must be the same; shapes of tensors say the rest."""
        ours = (self.rank, self.alpha)
        if isinstance(other, LoraConfig) and (other.rank, other.alpha) != ours:
            return (
                f"the checkpoint has rank {other.rank} and alpha {other.alpha:g}, "
                f"this model {self.rank} and {self.alpha:g}"
            )
        return super().mismatch(other)


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
