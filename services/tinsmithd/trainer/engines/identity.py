"""All that the last bit of a result depends on, besides calls and their compositions.

Two rank groups of equal identity compute the same bits on CPUs, and on GPUs where it says
`deterministic`. On other GPUs they compute the same up to rounding, since kernels there may add up
in another order each time.
"""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.supported import has_windows

NUMBERS_SINCE = "0.1.0"
"""The first release that computes the bits that this one computes. Ranks of a later release make
calls again that earlier ones recorded, while it stays: whoever changes a bit on purpose puts the
next release here, or gives what changed an entry of its own below."""
PACKAGES = ("transformers", "peft", "deepspeed")
"""Packages whose code decides how something is computed, besides torch and this one."""

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables by which the libraries under torch choose other kernels."""


def describe(
    engine: str, base: BaseModel, device: torch.device, **settings: object
) -> Mapping[str, str]:
    """Name and value of each such thing; the names are `lower_snake`.

    Args:
        engine: Name of the engine.
        base: The base model.
        device: Device that computes.
        settings: Settings of the engine that numbers depend on.
    """
    chosen = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    found: dict[str, object] = {
        "engine": engine,
        **settings,
        "base_model": base.fingerprint,
        "dtype": base.info.dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda or "",
        "environment": " ".join(chosen),
        "torch": torch.__version__,
        "tinsmith": NUMBERS_SINCE,
        **{name: _version(name) for name in PACKAGES},
    }
    # Earlier releases computed these in another way under the same versions. Models to which that
    # does not apply have no entry, so that calls which were recorded before can be made again.
    if base.info.dtype != "float32":
        found["logits"] = "float32"
    if has_windows(base.model.config):
        found["attention"] = "windows"
    if base.info.active_expert_count and engine == "deepspeed":
        found["experts"] = "grouped"
    return {name: str(value) for name, value in found.items()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""  # it runs from a folder


def _processor() -> str:
    """Model of the processor: libraries choose kernels by its caches and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    pairs = [line.partition(":") for line in lines]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    named = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    # A virtual machine may hide the name, but not the numbers.
    return " / ".join(values[name] for name in named if name in values) or platform.processor()
