"""LoRA adapters on one shared base model: many at once, of different rank and targets.

PEFT wraps the modules. `Adapters` keeps the adapters apart by key, draws their first values from a
seed, and reads and writes them under the names of PEFT's files.

    adapters = Adapters(base)
    adapters.add("a", LoraConfig(rank=8))
    with adapters.active("a") as model:             # None: the base model alone
        hidden = model.model(input_ids=...).last_hidden_state
"""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from tinsmithd.domain import LoraConfig, Tuning
from tinsmithd.errors import InvalidArgument
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.fused_lora import adapter_layer
from tinsmithd.modeling.trained import HeadLayer, TrainedWeights
from tinsmithd.tunings import EXPERT_PARAMETERS

ATTN_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
UNEMBED_MODULE = "lm_head"


@dataclass(frozen=True)
class Targets:
    """The layers of a model that an adapter can stand on, by PEFT's names.

    Attributes:
        attn: Linear layers of attention.
        mlp: Linear layers of MLPs.
        mlp_parameters: Weights of MLPs that PEFT reaches as parameters only: those of all experts,
            and those of dense layers in an architecture that has experts. There PEFT takes the
            names of dense layers for names that experts had in earlier releases of transformers.
        unembed: The head.
    """

    attn: Sequence[str]
    mlp: Sequence[str]
    mlp_parameters: Sequence[str]
    unembed: Sequence[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Targets":
        """Find the targets of a model that no adapter stands on yet."""
        layers = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        names = [name for name, _ in model.named_parameters()]
        mlp = [name for name in MLP_MODULES if name in layers]
        parameters = [e for e in EXPERT_PARAMETERS if any(n.endswith(f".{e}") for n in names)]
        if _are_taken_for_experts(mlp, model):
            parameters += [f"mlp.{name}.weight" for name in mlp]
            mlp = []
        return cls(
            attn=[name for name in ATTN_MODULES if name in layers],
            mlp=mlp,
            mlp_parameters=parameters,
            unembed=[UNEMBED_MODULE] if UNEMBED_MODULE in layers else [],
        )

    def chosen(self, lora: LoraConfig) -> tuple[list[str], list[str]]:
        """Modules and parameters that an adapter stands on.

        Raises:
            InvalidArgument: The model has no layers of a kind that it asks for; the field names it.
        """
        modules: list[str] = []
        parameters: list[str] = []
        for field, wanted, layers, weights in (
            ("train_attn", lora.train_attn, self.attn, ()),
            ("train_mlp", lora.train_mlp, self.mlp, self.mlp_parameters),
            ("train_unembed", lora.train_unembed, self.unembed, ()),
        ):
            if wanted and not layers and not weights:
                message = "the base model has no layer that this could adapt; set it to false"
                raise InvalidArgument(f"lora_config.{field}", message)
            if wanted:
                modules += layers
                parameters += weights
        if lora.expert_rank and not set(EXPERT_PARAMETERS) <= set(parameters):
            message = "no experts would be adapted; leave it unset"
            raise InvalidArgument("lora_config.expert_rank", message)
        return modules, parameters


class Adapters(TrainedWeights):
    """The adapters of one base model.

    The base model is wrapped in place: use it only through `active`.

    Args:
        base: The base model.
        fused: Compute linear layers and experts as `modeling.fused_lora` does instead of with
            PEFT's own forward; the base computes its experts with `use_grouped_experts`.
    """

    def __init__(self, base: BaseModel, *, fused: bool = False) -> None:
        self._base = base
        self._targets = Targets.of(base.model)
        self._fused = fused
        self._peft: PeftModel | None = None
        self._loras: dict[str, LoraConfig] = {}
        self._active: tuple[str | None] | None = None  # None: unknown

    def tuning(self, key: str) -> LoraConfig:
        """Shape of an adapter."""
        return self._loras[key]

    def add(self, key: str, tuning: Tuning) -> None:
        """Add an adapter: A uniform in ±1/sqrt(fan_in), drawn from `tuning.seed`; B zero.

        PEFT and Hu et al. start alike. Here each value depends only on the seed and the parameter's
        place in the sorted names.

        Raises:
            InvalidArgument: The model has no layers of a kind that it asks for; the field names it.
        """
        if key in self._loras:
            raise ValueError(f"adapter {key!r} exists")
        if not isinstance(tuning, LoraConfig):
            raise ValueError("an adapter has a LoraConfig")
        config, name = self._peft_config(tuning), _module_name(key)
        if self._fused:
            config._register_custom_module({torch.nn.Module: adapter_layer})
        self._active = None
        with warnings.catch_warnings():
            # PEFT warns of a head that shares the embedding's weight, but only the head is to be
            # adapted. And it asks transformers for an attribute under its old name.
            warnings.simplefilter("ignore")
            if self._peft is None:
                self._peft = PeftModel(self._base.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        self._loras[key] = tuning
        shapes = {name: parameter.shape for name, parameter in self.parameters(key).items()}
        self.import_weights(key, self.first_values(shapes, tuning))

    @staticmethod
    def first_values(shapes: Mapping[str, Sequence[int]], tuning: Tuning) -> dict[str, np.ndarray]:
        """The first values of an adapter, see `add`."""
        assert isinstance(tuning, LoraConfig)
        generator = torch.Generator().manual_seed(tuning.seed % (1 << 63))
        values: dict[str, np.ndarray] = {}
        for name, shape in shapes.items():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(shape[1])
                drawn = torch.rand(tuple(shape), generator=generator) * 2 * bound - bound
                values[name] = drawn.numpy()
            else:
                values[name] = np.zeros(tuple(shape), np.float32)
        return values

    def remove(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error."""
        if self._loras.pop(key, None) is not None:
            assert self._peft is not None
            self._active = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PEFT names the next active one
                self._peft.delete_adapter(_module_name(key))

    @contextlib.contextmanager
    def active(self, key: str | None) -> Iterator[Any]:
        """The causal language model with this adapter, or without any.

        Raises:
            KeyError: There is no such adapter.
        """
        if key is not None and key not in self._loras:
            raise KeyError(key)
        # Switching walks through every module, so it happens only when the adapter changes.
        if self._peft is not None and self._active != (key,):
            if key is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(_module_name(key))
            self._active = (key,)
        yield self._base.model

    def head(self, key: str | None) -> HeadLayer:
        """The model's head with what an adapter does to it."""
        layer = self._base.model.get_output_embeddings()
        base = getattr(layer, "base_layer", layer)
        name = None if key is None else _module_name(key)
        if name is None or base is layer or name not in layer.lora_A:
            return HeadLayer(base)
        return HeadLayer(
            base, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        )

    def parameters(self, key: str) -> dict[str, torch.nn.Parameter]:
        """An adapter's parameters, float32, by their names in PEFT's files, sorted."""
        assert self._peft is not None
        part = f".{_module_name(key)}."
        found = {
            name.replace(part, "."): parameter
            for name, parameter in self._peft.named_parameters()
            if part in name
        }
        return dict(sorted(found.items()))

    def config(self, key: str) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        config = self._peft_config(self._loras[key]).to_dict()
        config["inference_mode"] = True
        config["base_model_name_or_path"] = self._base.info.name
        return {
            name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for name, value in config.items()
        }

    def _peft_config(self, lora: LoraConfig) -> peft.LoraConfig:
        modules, parameters = self._targets.chosen(lora)
        alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=modules,
            target_parameters=parameters or None,
            rank_pattern=lora.config_entries.get("rank_pattern", {}),
        )


def _are_taken_for_experts(modules: Sequence[str], model: torch.nn.Module) -> bool:
    """Whether PEFT would put an adapter for these layers onto others."""
    config = peft.LoraConfig(target_modules=list(modules))
    convert_peft_config_for_transformers(config, model, None)
    return set(config.target_modules or ()) != set(modules)


def _module_name(key: str) -> str:
    # Keys become names of torch modules, which may hold neither dots nor anything surprising.
    return "adapter_" + hashlib.sha256(key.encode()).hexdigest()[:32]
