"""The process group of the ranks: started by torchrun, or one process alone."""

import datetime
import os

import torch
import torch.distributed as dist

IDLE_S_MAX = 365 * 86_400
"""How long ranks may wait for a command; a dead rank 0 ends them through torchrun."""

_control: dist.ProcessGroup | None = None


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun says; alone it is 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init() -> torch.device:
    """Join the process group, once; returns this rank's device."""
    global _control
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        _, world_size = rank_and_world_size()
        if world_size == 1:
            # Nobody to meet: no port is needed.
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
            timeout = datetime.timedelta(seconds=IDLE_S_MAX)
            _control = dist.new_group(backend="gloo", timeout=timeout)
        _init_deepspeed(backend)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _init_deepspeed(backend: str) -> None:
    import deepspeed

    if backend == "gloo":
        # DeepSpeed would compile an op for this; plain gloo does as well, without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def close() -> None:
    """Leave the process group, all ranks together: its threads must end before the process does."""
    global _control
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _control = None


def broadcast_bytes(data: bytes | None) -> bytes:
    """Give rank 0's bytes to every rank; the others pass None and wait as long as it takes."""
    if rank_and_world_size()[1] == 1:
        assert data is not None
        return data
    length = torch.tensor([len(data) if data is not None else 0])
    dist.broadcast(length, src=0, group=_control)
    if data is None:
        buffer = torch.empty(int(length), dtype=torch.uint8)
    else:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        buffer = buffer.to(torch.uint8)
    if int(length):
        dist.broadcast(buffer, src=0, group=_control)
    return buffer.numpy().tobytes()
