"""A model's state as the files of a checkpoint, and back. safetensors and JSON, never pickle.

`adapter_model.safetensors` and `adapter_config.json` are what PEFT writes and reads; of a model
that trains all weights, `model.safetensors`, `config.json` and the tokenizer's files are what
transformers does. `model_state.json` has our settings and the step count;
`optimizer.safetensors` the moments.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinsmithd.domain import FullConfig, LoraConfig, ModelState
from tinsmithd.errors import DataLoss, Reason

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
STATE_FILE = "model_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FULL_WEIGHTS_FILE = "model.safetensors"
FULL_CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
)
"""Of what a tokenizer saves, the files that a Hugging Face folder needs; not all have each."""
FORMAT_VERSION = 1


def to_files(state: ModelState) -> dict[str, bytes]:
    """Write a state as file name to content; the optimizer file only where there is state."""
    full = isinstance(state.tuning, FullConfig)
    about = {
        "format_version": FORMAT_VERSION,
        "full" if full else "lora": dataclasses.asdict(state.tuning),
        "step_count": state.step_count,
        "has_optimizer": bool(state.optimizer),
    }
    files = {
        **state.files,
        FULL_WEIGHTS_FILE if full else WEIGHTS_FILE: save(
            _contiguous(state.weights), metadata={"format": "pt"}
        ),
        FULL_CONFIG_FILE if full else PEFT_CONFIG_FILE: _json(state.config),
        STATE_FILE: _json(about),
    }
    if state.optimizer:
        files[OPTIMIZER_FILE] = save(_contiguous(state.optimizer))
    return files


def from_files(files: Mapping[str, bytes]) -> ModelState:
    """Read a state.

    Raises:
        DataLoss: A file is missing or not what it should be (CHECKPOINT_CORRUPT).
    """
    try:
        about = json.loads(files[STATE_FILE])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {about['format_version']} is not known here")
        full = "full" in about
        return ModelState(
            tuning=FullConfig(**about["full"]) if full else LoraConfig(**about["lora"]),
            weights=load(files[FULL_WEIGHTS_FILE if full else WEIGHTS_FILE]),
            optimizer=load(files[OPTIMIZER_FILE]) if OPTIMIZER_FILE in files else {},
            step_count=int(about["step_count"]),
            config=json.loads(files[FULL_CONFIG_FILE if full else PEFT_CONFIG_FILE]),
            files={name: files[name] for name in TOKENIZER_FILES if name in files},
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataLoss(
            f"checkpoint files are damaged: {error}", Reason.CHECKPOINT_CORRUPT
        ) from error


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
