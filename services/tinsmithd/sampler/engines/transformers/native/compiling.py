"""Finds the compiled part, or has this machine's C compiler make it once.

A compiled library runs with this process's rights, so it is taken only from a folder that nobody
but this user or root can write to. Its name is a digest of its source: another version of the
source is another file.
"""

import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tinsmithd.sampler.engines.transformers.native.abi import Library, Matrix, NotUsableError

SOURCE = Path(__file__).parent / "source"
COMPILED = ("step.c", "pool.c")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-w")
"""Nothing that lets a compiler sum in another order."""
_WIDE = ("-DWIDTH=16", "-mavx512f", "-mfma")
VARIANTS = {
    "amx": (*_WIDE, "-DAMX", "-mamx-tile", "-mamx-bf16", "-mavx512bw", "-mavx512bf16"),
    "avx512": _WIDE,
    "avx2": ("-DWIDTH=8", "-mavx2", "-mfma"),
}
"""What a library is compiled with for the instructions of a kind of processor, the best first."""
AMX_FLAGS = frozenset({"amx_tile", "amx_bf16", "avx512bw", "avx512_bf16"})
"""As `/proc/cpuinfo` has them."""
COMPILE_S_MAX = 120
GAP_MAX = 1e-4
"""Of a product of a few hundred terms of about 1."""

OnProgress = Callable[[str], None]


def load_library(folder: str, threads: int, *, on_progress: OnProgress) -> Library | None:
    """The compiled part for this machine, which is made first where need be.

    Args:
        folder: Where it is kept; empty: in the user's own cache.
        threads: That compute together.
        on_progress: Takes a line for a person.

    Returns:
        None where it cannot be had; a line says why.
    """
    variants = usable_variants()
    if not variants:
        on_progress("no compiled kernels: they are for x86-64 Linux with AVX2")
        return None
    for variant in variants:
        try:
            library = Library(compiled(variant, kept_in(folder)), threads)
        except NotUsableError:
            on_progress(f"compiled kernels for {variant}: the system does not allow them")
            continue
        except (
            *(OSError, ValueError, MemoryError, subprocess.SubprocessError),
            RuntimeError,  # there is no home for a cache
        ) as error:
            on_progress(f"no compiled kernels: {_said(error)}")
            return None
        if multiplies(library):
            return library
        library.close()
        on_progress(f"compiled kernels for {variant} multiply wrongly here: not used")
    return None


def can_be_had(folder: str) -> bool:
    """Whether `load_library` has something to load; compiles it where need be."""
    try:
        return any(compiled(variant, kept_in(folder)) for variant in usable_variants()[:1])
    except (OSError, subprocess.SubprocessError):
        return False


def usable_variants() -> list[str]:
    """Those that this processor can run, best first; `ATEN_CPU_CAPABILITY` may say less."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return []
    capability: str = torch.backends.cpu.get_cpu_capability()
    found = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])
    if "avx512" in found and _flags() >= AMX_FLAGS:
        found.insert(0, "amx")
    return found


def _flags() -> set[str]:
    """What the kernel says that the first processor can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def kept_in(folder: str) -> Path:
    """The folder of compiled libraries; empty stands for the user's own."""
    if folder:
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tinsmith" / "native"


def compiled(variant: str, folder: Path) -> Path:
    """The library of a variant, compiled unless it is there.

    Raises:
        OSError: There is no compiler, or the folder is not ours alone.
        subprocess.SubprocessError: The compiler failed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    check_private(folder)
    for parent in folder.parents:
        check_private(parent, sticky=True)
    path = folder / f"kernels-{variant}-{_digest(variant)}.so"
    if not path.exists():
        _compile(variant, path)
    check_private(path)
    return path


def check_private(path: Path, *, sticky: bool = False) -> None:
    """Refuse what others than this user and root may have written.

    Args:
        path: A file or folder.
        sticky: It may be a folder where others write what is theirs, and touch nothing else.

    Raises:
        PermissionError: They may.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} is a link, or belongs to somebody else")
    written = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if written and not (sticky and found.st_mode & stat.S_ISVTX):
        raise PermissionError(f"{path} can be written by others")


def multiplies(library: Library) -> bool:
    """Whether its products are those of torch, of weights and rows of both kinds."""
    dice = torch.Generator().manual_seed(0)
    for k, narrow in itertools.product((256, 259), (False, True)):
        weight = torch.randn(131, k, generator=dice).bfloat16().float()
        rows = torch.randn(19, k, generator=dice)
        panels = library.packed(weight, narrow=narrow)
        matrix = Matrix(panels.data_ptr(), None, *weight.shape, narrow)
        for own, is_narrow in ((rows, False), (rows.bfloat16().float(), narrow)):
            found = library.product(matrix, own, narrow=is_narrow)
            if not (found - own @ weight.T).abs().max() <= GAP_MAX:
                return False
    return True


@functools.cache
def _digest(variant: str) -> str:
    made = hashlib.sha256(repr((FLAGS, VARIANTS[variant])).encode())
    for path in sorted(SOURCE.iterdir()):
        made.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return made.hexdigest()[:32]


def _compile(variant: str, path: Path) -> None:
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc"))), "")
    compiler = shlex.split(found)
    if not compiler:
        raise FileNotFoundError("there is no C compiler")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        sources = [str(SOURCE / name) for name in COMPILED]
        subprocess.run(
            [*compiler, *FLAGS, *VARIANTS[variant], *sources, "-o", made, "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_S_MAX,
        )
        made.chmod(0o500)
        made.replace(path)


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"the compiler failed: {(error.stderr or '').strip().splitlines()[:1]}"
    return str(error)
