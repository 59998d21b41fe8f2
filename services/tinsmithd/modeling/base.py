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
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from tinsmithd.domain import BaseModelInfo
from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky
from tinsmithd.modeling.stored_weights import StoredWeights
from tinsmithd.modeling.supported import check_config, check_positions
from tinsmithd.modeling.tokenizer_files import read_tokenizer_files
from tinsmithd.modeling.weight_files import check_fetched, check_loaded, check_weights, refused
from tinsmithd.tunings import EXPERT_PARAMETERS

FINGERPRINT_ELEMENTS = 256
"""Elements of each parameter that a fingerprint reads; it may read up to twice as many."""

NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say who wrote it where, and nothing of the model."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Keep = Callable[[Any, StoredWeights], None]
"""Gives the parameters of a model, which are on the meta device, what this process keeps of them.

Who made the function knows what a parameter holds then.
"""

Sample = Callable[[str, int], torch.Tensor]
"""Gives every n-th element of a parameter by its name, in host memory."""


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


def load_base(
    name_or_folder: str,
    *,
    dtype: str,
    on_progress: Callable[[str], None],
    keep: Keep | None = None,
) -> BaseModel:
    """Load a base model and its tokenizer.

    It reads safetensors only and runs no code of the model's.

    Args:
        name_or_folder: Hugging Face name, or a folder in its format.
        dtype: "float32" or "bfloat16", of the frozen weights.
        on_progress: Takes a line for a person now and then.
        keep: Reads what this process keeps of the weights; without it that is all, on its device.

    Raises:
        NotFound: There is no such model, its files are cut or missing, its weights are not those
            that its configuration asks for, or something in it is not supported. The message names
            the fault (BASE_MODEL_NOT_FOUND).
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = _name_of(name_or_folder)
    on_progress(f"loading {name}")
    start_s = time.monotonic()
    config = read_config(name_or_folder)
    device = _device()
    model, tokenizer = _load(name_or_folder, dtype, torch.device("meta") if keep else device)
    if keep:
        _compute_buffers(model, device)
    check_positions(name, model)

    def say(message: str) -> None:
        on_progress(f"{name}: {message}")

    if keep:
        with StoredWeights(model, _folder(name_or_folder), say) as stored:
            _tie(model, stored)
            parameters = dict(model.named_parameters())
            keep(model, stored)
            fingerprint = _fingerprint(config, parameters, stored.sample)
    else:
        parameters = dict(model.named_parameters())
        fingerprint = _fingerprint(config, parameters, _sampler(parameters))
    count = sum(parameter.numel() for parameter in parameters.values())
    took_s = time.monotonic() - start_s
    say(f"{count / 1e6:,.1f} M parameters, {dtype}, loaded in {took_s:.1f} s")
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


def read_config(name_or_folder: str) -> Any:
    """A base model's configuration, checked, before anything else of it is read.

    Raises:
        NotFound: See `load_base`.
    """
    folder = Path(name_or_folder)
    try:
        if folder.is_dir():
            check_fetched(folder)
        config = AutoConfig.from_pretrained(name_or_folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise refused(repr(name_or_folder), _line(error)) from error
    check_config(_name_of(name_or_folder), config)
    return config


def _name_of(name_or_folder: str) -> str:
    folder = Path(name_or_folder)
    return folder.resolve().name if folder.is_dir() else name_or_folder


def active_expert_count(model: Any) -> int:
    """Experts that a token passes through in a layer that has some; 0 in a dense model."""
    names = (name for name, _ in model.named_parameters())
    has_experts = any(name.endswith(EXPERT_PARAMETERS) for name in names)
    return int(model.config.num_experts_per_tok) if has_experts else 0


def _device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _load(name_or_folder: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Load the model, frozen, with exactly the weights of its configuration, and its tokenizer.

    On the meta device nothing is read but the headers of files, with the same checks.
    """
    folder = Path(name_or_folder)
    try:
        if folder.is_dir():
            check_weights(folder)
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_folder,
            dtype=DTYPES[dtype],
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` refuses them by their names
        )
        check_loaded(name_or_folder, found)
        model.requires_grad_(False)
        model.eval()
        model.config.use_cache = False
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error) or is_sticky(error):
            raise  # the model is not to blame
        raise refused(repr(name_or_folder), _line(error)) from error
    return model, tokenizer


def _folder(name_or_folder: str) -> Path:
    """The folder with the files of a model that was loaded."""
    found: str = cached_file(name_or_folder, "config.json")
    return Path(found).parent


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute what is on the meta device beside parameters: no file has it."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            computed = type(module)(model.config)
            for name, buffer in computed.named_buffers():
                module.register_buffer(name, buffer.to(device), persistent=False)


def _tie(model: Any, stored: StoredWeights) -> None:
    """Share weights that the files have twice with equal values, as transformers does."""
    for name, other in model.all_tied_weights_keys.items():
        ours, theirs = model.get_parameter(name), model.get_parameter(other)
        if ours is not theirs and stored.equal(name, other):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, theirs)


def _sampler(parameters: Mapping[str, torch.Tensor]) -> Sample:
    def sample(name: str, step: int) -> torch.Tensor:
        return parameters[name].detach().reshape(-1)[::step].contiguous().cpu()

    return sample


def _fingerprint(config: Any, parameters: Mapping[str, torch.Tensor], sample: Sample) -> str:
    """A digest of the configuration and, per parameter, of name, shape, dtype and some elements.

    The elements stand at equal distances. So a bounded number of reads tells models apart that were
    trained differently, however large they are. A model of which somebody changed a few elements on
    purpose may have the same digest.
    """
    digest = hashlib.sha256()
    known = {k: v for k, v in config.to_dict().items() if k not in NOT_OF_THE_MODEL}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, parameter in sorted(parameters.items()):
        elements = sample(name, max(1, parameter.numel() // FINGERPRINT_ELEMENTS))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(elements.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
