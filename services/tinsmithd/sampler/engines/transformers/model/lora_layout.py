"""Where adapters stand in a decoder, and which weights a checkpoint must have for that.

A decoder has four products per layer, of which some hold several of the model's linear layers side
by side. Each such product is a `Site`; the linear layers in it are its parts. All experts of a
layer are a place of their own, and so is the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.errors import FailedPrecondition, InvalidArgument, Reason
from tinsmithd.modeling.lora import UNEMBED_MODULE, Targets
from tinsmithd.modeling.trained import check_same_shape
from tinsmithd.tunings import EXPERT_PARAMETERS

PREFIX = "base_model.model."
"""PEFT's files put it before the names of a model's modules."""


class Site(IntEnum):
    """A product in each layer, by the linear layers whose weights it holds."""

    QKV = 0
    O = 1  # noqa: E741  # the name that everybody gives it
    GATE_UP = 2
    DOWN = 3


SITE_MODULES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of each site, in the order of their rows."""


@dataclass(frozen=True)
class Part:
    """One linear layer: its name in the model, and its sizes."""

    name: str
    d_out: int
    d_in: int


@dataclass(frozen=True)
class ExpertPart:
    """One weight of all experts of a layer: its name in PEFT's files, and its sizes."""

    name: str
    experts: int
    d_out: int
    d_in: int


@dataclass(frozen=True)
class LayerLayout:
    """The parts of one layer, by site; empty where the layer lacks one. Then those of experts."""

    sites: tuple[tuple[Part, ...], ...]
    experts: tuple[ExpertPart, ...]


@dataclass(frozen=True)
class LoraLayout:
    """The places of adapters in one model.

    Attributes:
        layers: Per layer.
        head: The layer that makes logits.
        targets: What PEFT reaches as modules, and what as parameters.
    """

    layers: tuple[LayerLayout, ...]
    head: Part
    targets: Targets

    @classmethod
    def of(cls, model: Any) -> "LoraLayout":
        """Read the places off a causal language model of transformers, of a supported family."""
        layers = tuple(
            _layer_layout(f"model.layers.{i}.", layer) for i, layer in enumerate(model.model.layers)
        )
        vocab, hidden = model.get_output_embeddings().weight.shape
        return cls(layers, Part(UNEMBED_MODULE, vocab, hidden), Targets.of(model))

    def places(self, lora: LoraConfig) -> "WantedPlaces":
        """The places that an adapter stands on.

        Raises:
            InvalidArgument: The model has no layers of a kind that it asks for; the field names it.
        """
        modules, parameters = self.targets.chosen(lora)
        return WantedPlaces(self, frozenset(modules), frozenset(parameters))

    def wanted(self, state: ModelState) -> "WantedPlaces":
        """Find the places of an adapter, and check that it has exactly their weights.

        Raises:
            FailedPrecondition: It does not fit the base model (INCOMPATIBLE_CHECKPOINT). The
                message names the first weight that differs, with both shapes.
        """
        lora = state.tuning
        if not isinstance(lora, LoraConfig):
            raise misfit(f"the checkpoint holds {lora.noun}, no adapter")
        try:
            places = self.places(lora)
        except InvalidArgument as error:
            message = f"the checkpoint does not fit this base model: {error.message}"
            raise misfit(message) from error
        check_same_shape(places.shapes(lora), state.weights)
        for name, array in sorted(state.weights.items()):
            if array.dtype.kind != "f":
                raise misfit(f"the checkpoint has {name} of dtype {array.dtype}, not of floats")
        return places


@dataclass(frozen=True)
class WantedPlaces:
    """The places that one adapter stands on."""

    layout: LoraLayout
    modules: frozenset[str]
    parameters: frozenset[str]

    def has(self, part: Part) -> bool:
        """Whether it stands on a linear layer."""
        last = part.name.rpartition(".")[2]
        return last in self.modules or f"mlp.{last}.weight" in self.parameters

    @property
    def has_experts(self) -> bool:
        """Whether it stands on experts, where a layer has some."""
        return self.parameters.issuperset(EXPERT_PARAMETERS)

    def parts(self) -> list[Part]:
        """All linear layers that it stands on."""
        everywhere = [part for layer in self.layout.layers for site in layer.sites for part in site]
        return [part for part in (*everywhere, self.layout.head) if self.has(part)]

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each weight, by its name in PEFT's files."""
        rank = lora.rank
        found: dict[str, tuple[int, ...]] = {}
        for part in self.parts():
            name_a, name_b = names(part.name)
            found[name_a], found[name_b] = (rank, part.d_in), (part.d_out, rank)
        for layer in self.layout.layers if self.has_experts else ():
            for expert in layer.experts:
                name_a, name_b = names(expert.name)
                ranks = lora.expert_adapter_rank * expert.experts
                found[name_a], found[name_b] = (ranks, expert.d_in), (expert.d_out, ranks)
        return found


def names(module: str) -> tuple[str, str]:
    """The names of A and B in PEFT's files."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def expert_factors(
    part: ExpertPart, rank: int, weights: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A `(experts, rank, d_in)` and B `(experts, d_out, rank)`, in the order that PEFT reads."""
    name_a, name_b = names(part.name)
    a = weights[name_a].reshape(part.experts, rank, part.d_in)
    b = weights[name_b].reshape(part.d_out, rank, part.experts).transpose(2, 0, 1)
    return a, b


def misfit(message: str) -> FailedPrecondition:
    """The error of an adapter that cannot stand on this base model."""
    return FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)


def _layer_layout(prefix: str, layer: Any) -> LayerLayout:
    modules = dict(layer.named_modules())
    sites = tuple(
        tuple(Part(prefix + name, *modules[name].weight.shape) for name in site if name in modules)
        for site in SITE_MODULES
    )
    experts = getattr(layer.mlp, "experts", None)
    if experts is None:
        return LayerLayout(sites, ())
    # PEFT wraps the same module twice, first for `gate_up_proj`.
    names_of = (f"{prefix}mlp.experts.base_layer", f"{prefix}mlp.experts")
    weights = (experts.gate_up_proj, experts.down_proj)
    found = tuple(ExpertPart(n, *w.shape) for n, w in zip(names_of, weights, strict=True))
    return LayerLayout(sites, found)
