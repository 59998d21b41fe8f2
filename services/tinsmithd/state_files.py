"""An adapter's state as the files of a checkpoint, and back. safetensors and JSON, never pickle.

`adapter_model.safetensors` and `adapter_config.json` are what PEFT writes and reads;
`model_state.json` has our LoRA settings and the step count; `optimizer.safetensors` the moments.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinsmithd.domain import AdapterState, LoraConfig
from tinsmithd.errors import DataLoss, Reason

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
STATE_FILE = "model_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT_VERSION = 1


def to_files(state: AdapterState) -> dict[str, bytes]:
    """Write a state as file name to content; the optimizer file only where there is state."""
    about = {
        "format_version": FORMAT_VERSION,
        "lora": dataclasses.asdict(state.lora),
        "step_count": state.step_count,
        "has_optimizer": bool(state.optimizer),
    }
    files = {
        WEIGHTS_FILE: save(_contiguous(state.weights), metadata={"format": "pt"}),
        PEFT_CONFIG_FILE: _json(state.peft_config),
        STATE_FILE: _json(about),
    }
    if state.optimizer:
        files[OPTIMIZER_FILE] = save(_contiguous(state.optimizer))
    return files


def from_files(files: Mapping[str, bytes]) -> AdapterState:
    """Read a state.

    Raises:
        DataLoss: A file is missing or not what it should be (CHECKPOINT_CORRUPT).
    """
    try:
        about = json.loads(files[STATE_FILE])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {about['format_version']} is not known here")
        return AdapterState(
            lora=LoraConfig(**about["lora"]),
            weights=load(files[WEIGHTS_FILE]),
            optimizer=load(files[OPTIMIZER_FILE]) if OPTIMIZER_FILE in files else {},
            step_count=int(about["step_count"]),
            peft_config=json.loads(files[PEFT_CONFIG_FILE]),
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataLoss(
            f"checkpoint files are damaged: {error}", Reason.CHECKPOINT_CORRUPT
        ) from error


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
