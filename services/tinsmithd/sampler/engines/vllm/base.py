"""What is known of a base model without its weights, which vLLM alone loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinsmithd.domain import BaseModelInfo, LoraConfig, ModelState
from tinsmithd.errors import FailedPrecondition, InvalidArgument, Reason
from tinsmithd.modeling.base import active_expert_count
from tinsmithd.modeling.lora import Targets
from tinsmithd.modeling.supported import check_config
from tinsmithd.modeling.tokenizer_files import read_tokenizer_files
from tinsmithd.modeling.trained import check_same_shape
from tinsmithd.modeling.weight_files import check_fetched, check_weights, refused

PREFIX = "base_model.model."
"""PEFT's files put it before the names of a model's modules."""


@dataclass(frozen=True)
class KnownBase:
    """A base model whose weights are elsewhere.

    Attributes:
        source: Hugging Face name or folder.
        info: Its name and sizes; its dtype is "auto" until vLLM has chosen one.
        tokenizer: Its tokenizer.
        tokenizer_files: The files that the tokenizer was read from, by name, and `config.json`.
        eos_ids: Its end-of-sequence tokens.
        adaptable: The layers that an adapter can stand on.
    """

    source: str
    info: BaseModelInfo
    tokenizer: Any
    tokenizer_files: Mapping[str, bytes]
    eos_ids: frozenset[int]
    adaptable: "AdaptableLayers"

    def within(self, context_tokens_max: int) -> "KnownBase":
        """The same with no longer context; 0 leaves it."""
        most = min(self.info.context_length, context_tokens_max or self.info.context_length)
        return replace(self, info=replace(self.info, context_length=most))

    def loaded(self, dtype: str) -> "KnownBase":
        """The same, as vLLM has loaded it."""
        return replace(self, info=replace(self.info, dtype=dtype))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        # Cleaned-up text would lose the space before a dot, and so miss a stop string.
        text: str = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True)
class AdaptableLayers:
    """The linear layers of a model by name, with `(d_out, d_in)`, and what PEFT calls them."""

    shapes: Mapping[str, tuple[int, int]]
    targets: Targets

    @classmethod
    def of(cls, model: torch.nn.Module) -> "AdaptableLayers":
        """Read them off a causal language model of transformers, with or without weights."""
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        return cls(shapes, Targets.of(model))

    @property
    def modules(self) -> list[str]:
        """The last parts of the names of those that vLLM can adapt, which experts are not."""
        return [*self.targets.attn, *self.targets.mlp, *self.targets.unembed]

    def check(self, state: ModelState) -> list[str]:
        """Check that a state has exactly the weights of an adapter that vLLM can serve.

        Returns:
            The last parts of the names of the layers that it stands on.

        Raises:
            FailedPrecondition: It has not (INCOMPATIBLE_CHECKPOINT).
        """
        lora = state.tuning
        if not isinstance(lora, LoraConfig):
            raise misfit(f"the checkpoint holds {lora.noun}, no adapter")
        try:
            modules, parameters = self.targets.chosen(lora)
        except InvalidArgument as error:
            message = f"the checkpoint does not fit this base model: {error.message}"
            raise misfit(message) from error
        if parameters:
            raise misfit(
                f"the checkpoint adapts {', '.join(parameters)}, which engine vllm does not serve; "
                "train with train_mlp=False, or sample with engine transformers"
            )
        expected: dict[str, Sequence[int]] = {}
        for name, (d_out, d_in) in self.shapes.items():
            if name.rpartition(".")[2] in modules:
                expected[f"{PREFIX}{name}.lora_A.weight"] = (lora.rank, d_in)
                expected[f"{PREFIX}{name}.lora_B.weight"] = (d_out, lora.rank)
        check_same_shape(expected, state.weights)
        return sorted(modules)


def misfit(message: str) -> FailedPrecondition:
    """The refusal of an adapter."""
    return FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)


def read_base(name_or_folder: str) -> KnownBase:
    """Read all but the weights of a base model, whose code is never run.

    Args:
        name_or_folder: Hugging Face name, or a folder in its format.

    Raises:
        NotFound: There is no such model, its files are cut or missing, or something in it is not
            supported. The message names the fault (BASE_MODEL_NOT_FOUND).
    """
    folder = Path(name_or_folder)
    name = folder.resolve().name if folder.is_dir() else name_or_folder
    try:
        if folder.is_dir():
            check_fetched(folder)
        config = AutoConfig.from_pretrained(name_or_folder)
        check_config(name, config)
        if folder.is_dir():
            check_weights(folder)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise refused(repr(name_or_folder), " ".join(str(error).split())[:500]) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    info = BaseModelInfo(
        name=name,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        dtype="auto",
        layer_count=config.num_hidden_layers,
        parameter_count=sum(parameter.numel() for parameter in model.parameters()),
        active_expert_count=active_expert_count(model),
    )
    return KnownBase(
        name_or_folder,
        info,
        tokenizer,
        read_tokenizer_files(name_or_folder, tokenizer),
        _eos_ids(name_or_folder, config, tokenizer),
        AdaptableLayers.of(model),
    )


def _eos_ids(name_or_folder: str, config: Any, tokenizer: Any) -> frozenset[int]:
    """The model's end-of-sequence tokens, from the first of its files that names them."""
    try:
        generation = GenerationConfig.from_pretrained(name_or_folder)
    except OSError:  # it has no such file
        generation = None
    for source in (generation, config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
