"""What errors of a device mean: that memory does not suffice, or that the device is lost to us.

Libraries under torch say most of it in words alone: cuBLAS and NCCL take memory of their own, and
what they lack is no `OutOfMemoryError`.
"""

import torch

_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch, of a CPU
    "out of memory",  # CUDA, and NCCL quoting it
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER
    "Failed to CUDA calloc",  # NCCL
)
_STICKY = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "GPU is lost",
    "CUDA error: unknown error",
)
"""After one of these every further call of the process to its device fails, too."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_sticky(error: BaseException) -> bool:
    """Whether an error, or what it came of, says that this process cannot use its device again."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError) and any(text in str(found) for text in _STICKY):
            return True
        found = found.__cause__ or found.__context__
    return False
