"""What the words of torch, cuBLAS, NCCL and CUDA mean, as those libraries say them."""

import pytest
import torch

from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NCCL = (
    "NCCL error in: NCCLUtils.cpp:37, unhandled cuda error, NCCL version 2.29\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.distributed.DistBackendError(NCCL),
        torch.distributed.DistBackendError("Failed to CUDA calloc async 608 bytes"),
        RuntimeError(CUBLAS),
        RuntimeError(CPU),
        MemoryError(),
    ],
)
def test_what_a_library_lacks_is_memory(error: BaseException) -> None:
    """Whoever took it; and a process that lacks memory can go on."""
    assert is_out_of_memory(error)
    assert not is_sticky(error)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unknown error",
    ],
)
def test_a_device_that_is_lost_is_known_under_what_came_of_it(text: str) -> None:
    """It is no lack of memory."""
    error = torch.AcceleratorError(text)
    assert is_sticky(error)
    assert not is_out_of_memory(error)
    outer = ValueError("a model broke")
    outer.__cause__ = error
    assert is_sticky(outer)


def test_a_mistake_of_ours_is_neither() -> None:
    """Nor is what somebody quotes in an error of another kind."""
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        ValueError("out of memory"),
        ValueError("unspecified launch failure"),
    ):
        assert not is_out_of_memory(error)
        assert not is_sticky(error)
