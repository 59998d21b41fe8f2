"""Loads a base model: a Hugging Face name or folder, frozen, with its tokenizer."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # transformers looks for DeepSpeed, and DeepSpeed for devices, with a warning.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinsmithd.domain import BaseModelInfo
from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky
from tinsmithd.modeling.supported import check_config, check_positions
from tinsmithd.modeling.tokenizer_files import read_tokenizer_files
from tinsmithd.modeling.weight_files import check_fetched, check_loaded, check_weights, refused
from tinsmithd.tunings import EXPERT_PARAMETERS

FINGERPRINT_ELEMENTS = 256
"""Elements of each parameter that a fingerprint reads; it may read up to twice as many."""

NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say who wrote it where, and nothing of the model."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: The causal language model, every parameter frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        tokenizer_files: The files that the tokenizer was read from, by name, and `config.json`.
        info: Its name, sizes and dtype.
        fingerprint: Distinguishes it from other base models, also from those of the same name.
    """

    model: Any
    tokenizer: Any
    tokenizer_files: Mapping[str, bytes]
    info: BaseModelInfo
    fingerprint: str


def load_base(name_or_folder: str, *, dtype: str, on_progress: Callable[[str], None]) -> BaseModel:
    """Load a base model and its tokenizer.

    It reads safetensors only and runs no code of the model's.

    Args:
        name_or_folder: Hugging Face name, or a folder in its format.
        dtype: "float32" or "bfloat16", of the frozen weights.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: There is no such model, its files are cut or missing, its weights are not those
            that its configuration asks for, or something in it is not supported. The message names
            the fault (BASE_MODEL_NOT_FOUND).
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(name_or_folder)
    name = folder.resolve().name if folder.is_dir() else name_or_folder
    on_progress(f"loading {name}")
    start_s = time.monotonic()
    try:
        if folder.is_dir():
            check_fetched(folder)
        config = AutoConfig.from_pretrained(name_or_folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise refused(repr(name_or_folder), _line(error)) from error
    check_config(name, config)
    model, tokenizer = _load(name_or_folder, dtype)
    check_positions(name, model)
    # Only now is each weight whole and in host memory.
    fingerprint = _fingerprint(config, model)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if torch.cuda.is_available():
        model.to(torch.device("cuda", torch.cuda.current_device()))
    count = sum(parameter.numel() for parameter in model.parameters())
    took_s = time.monotonic() - start_s
    on_progress(f"{name}: {count / 1e6:,.1f} M parameters, {dtype}, loaded in {took_s:.1f} s")
    info = BaseModelInfo(
        name=name,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        dtype=dtype,
        layer_count=config.num_hidden_layers,
        parameter_count=count,
        active_expert_count=active_expert_count(model),
    )
    files = read_tokenizer_files(name_or_folder, tokenizer)
    return BaseModel(model, tokenizer, files, info, fingerprint)


def active_expert_count(model: Any) -> int:
    """Experts that a token passes through in a layer that has some; 0 in a dense model."""
    names = (name for name, _ in model.named_parameters())
    has_experts = any(name.endswith(EXPERT_PARAMETERS) for name in names)
    return int(model.config.num_experts_per_tok) if has_experts else 0


def _load(name_or_folder: str, dtype: str) -> tuple[Any, Any]:
    """Load the model with exactly the weights of its configuration, and its tokenizer."""
    folder = Path(name_or_folder)
    try:
        if folder.is_dir():
            check_weights(folder)
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` refuses them by their names
        )
        check_loaded(name_or_folder, found)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error) or is_sticky(error):
            raise  # the model is not to blame
        raise refused(repr(name_or_folder), _line(error)) from error
    return model, tokenizer


def _fingerprint(config: Any, model: Any) -> str:
    """A digest of the configuration and, per parameter, of name, shape, dtype and some elements.

    The elements stand at equal distances. So a bounded number of reads tells models apart that were
    trained differently, however large they are. A model of which somebody changed a few elements on
    purpose may have the same digest.
    """
    digest = hashlib.sha256()
    known = {k: v for k, v in config.to_dict().items() if k not in NOT_OF_THE_MODEL}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // FINGERPRINT_ELEMENTS)].contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
