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

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinsmithd.domain import BaseModelInfo
from tinsmithd.errors import NotFound, Reason
from tinsmithd.modeling.tokenizer_files import read_tokenizer_files

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Architectures whose LoRA targets and numbers the conformance suite checks."""

FINGERPRINT_ELEMENTS = 256
"""Elements of each parameter that a fingerprint reads, or up to twice as many."""

NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say where and by what it was written."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: The causal language model, every parameter frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        tokenizer_files: The files that the tokenizer was read from, by name, and `config.json`.
        info: What it is.
        fingerprint: Tells it from another base model, of the same name too.
    """

    model: Any
    tokenizer: Any
    tokenizer_files: Mapping[str, bytes]
    info: BaseModelInfo
    fingerprint: str


def load_base(name_or_folder: str, *, dtype: str, on_progress: Callable[[str], None]) -> BaseModel:
    """Load a base model and its tokenizer.

    Only safetensors are read and no code of the model's is run.

    Args:
        name_or_folder: Hugging Face name, or a folder in its format.
        dtype: "float32" or "bfloat16": what the frozen weights are held in.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: There is no such model, or its architecture is not supported
            (BASE_MODEL_NOT_FOUND).
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(name_or_folder)
    name = folder.resolve().name if folder.is_dir() else name_or_folder
    on_progress(f"loading {name}")
    start_s = time.monotonic()
    try:
        config = AutoConfig.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _not_found(f"cannot read base model {name_or_folder!r}: {_line(error)}") from error
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise _not_found(f"{name}: architecture {config.model_type!r} is not one of {known}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_folder, dtype=DTYPES[dtype], use_safetensors=True, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _not_found(f"cannot load base model {name_or_folder!r}: {_line(error)}") from error
    # Here, while each weight is whole and in host memory.
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
    )
    files = read_tokenizer_files(name_or_folder, tokenizer)
    return BaseModel(model, tokenizer, files, info, fingerprint)


def _fingerprint(config: Any, model: Any) -> str:
    """A digest of the configuration and, per parameter, of name, shape, dtype and some elements.

    The elements stand at equal distances, so that one read of a bounded number of places tells
    apart models that were trained differently, however large they are. It does not find a model
    of which a few elements were changed on purpose.
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


def _not_found(message: str) -> NotFound:
    return NotFound(message, Reason.BASE_MODEL_NOT_FOUND)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
