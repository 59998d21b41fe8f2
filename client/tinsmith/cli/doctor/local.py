"""Checks of this machine: programs, room on disks, GPUs."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tinsmith
from tinsmith._tokenizer import cache_folder
from tinsmith.cli.doctor.findings import OK, SKIPPED, WARNING, WRONG, Finding
from tinsmith.cli.extras import missing_for
from tinsmith.cli.text import size

_SHOWN = ("grpcio", "protobuf", "numpy")
_EXTRAS = ("client", "control", "gateway", "server")
FREE_BYTES_LEAST, FREE_BYTES_FEW = 1_000_000_000, 10_000_000_000
"""Less than the first is wrong, less than the second worth a word."""
GPU_TIMEOUT_S = 20.0


def all_findings(data: Path) -> Iterator[Finding]:
    """What is so here; `data` is where a cluster of this machine keeps everything."""
    yield _program()
    yield _extras()
    yield from _disks(data)
    yield _gpus()


def _program() -> Finding:
    versions = {name: _version(name) for name in _SHOWN}
    lost = [name for name, version in versions.items() if not version]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"tinsmith {tinsmith.__version__}, Python {platform.python_version()}, {shown}"
    if lost:
        return Finding(
            "program", WRONG, f"{', '.join(lost)} is not installed", "pip install tinsmith"
        )
    return Finding("program", OK, text)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extras() -> Finding:
    lacks = {extra: missing_for(extra) for extra in _EXTRAS}
    whole = [extra for extra, lost in lacks.items() if not lost]
    partly = [f"{extra} lacks {', '.join(lost)}" for extra, lost in lacks.items() if lost]
    text = "; ".join([f"{', '.join(whole) or 'none'} installed", *partly])
    hint = "" if not lacks["server"] else "`tinsmith up` needs pip install 'tinsmith[server]'"
    return Finding("extras", OK, text, hint)


def _disks(data: Path) -> Iterator[Finding]:
    folders = {
        "data": data,
        "cache": cache_folder(),
        "temporary files": Path(tempfile.gettempdir()),
    }
    for name, folder in folders.items():
        check = f"disk: {name}"
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            yield Finding(check, WRONG, f"{folder}: {error.strerror}")
            continue
        text = f"{folder}: {size(free)} free"
        if not os.access(there, os.W_OK):
            yield Finding(check, WRONG, f"{there} cannot be written to", "choose another folder")
        elif free < FREE_BYTES_LEAST:
            yield Finding(check, WRONG, text, "make room: what is saved there is refused soon")
        elif free < FREE_BYTES_FEW:
            yield Finding(check, WARNING, text, "a base model and some checkpoints take more")
        else:
            yield Finding(check, OK, text)


def _gpus() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        if Path("/dev/nvidiactl").exists():
            return Finding(
                "GPU", WARNING, "there is one, but no nvidia-smi", "install the driver's tools"
            )
        return Finding(
            "GPU", SKIPPED, "there is none that nvidia-smi knows of: computing is on the CPU"
        )
    command = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("GPU", WRONG, f"nvidia-smi: {error}", "look at the driver: `dmesg`")
    if done.returncode:
        text = " ".join((done.stdout + done.stderr).split())
        return Finding("GPU", WRONG, f"nvidia-smi: {text}", "look at the driver: `dmesg`")
    text = "; ".join(line.strip() for line in done.stdout.splitlines())
    torch = _version("torch")
    if torch.endswith("+cpu"):
        hint = "install a torch that was built for CUDA, or the GPU stays idle"
        return Finding("GPU", WARNING, f"{text}; torch {torch} was built without CUDA", hint)
    return Finding("GPU", OK, f"{text}; torch {torch}" if torch else text)
