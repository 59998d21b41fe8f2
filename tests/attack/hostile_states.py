"""What a rank that is none may say when it is asked for a state."""

from typing import Any

from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmith.v1 import types_pb2

NO_NAMES = ["../x", "/tmp/x", "", ".", "a/b", "a\0b", "x" * 300]


def deposited(*files: tuple[str, int]) -> dict[str, Any]:
    """The end of a state whose files are said to lie in a deposit."""
    found = [link_pb.DepositedFile(file_name=name, size_bytes=size) for name, size in files]
    lora = types_pb2.LoraConfig(rank=4)
    return {"done": link_pb.Done(lora_config=lora, deposited=found)}


STATES = {
    **{
        f"a piece of {name[:9]!r}": {"piece": link_pb.StatePiece(file_name=name, data=b"x")}
        for name in NO_NAMES
    },
    **{f"{name[:9]!r} in a deposit": deposited((name, 1)) for name in NO_NAMES},
    "a deposit that nobody asked for": deposited(("adapter_model.safetensors", 1)),
    "fewer bytes than none": deposited(("adapter_model.safetensors", -1)),
    "a file twice": deposited(("adapter_model.safetensors", 1), ("adapter_model.safetensors", 2)),
}
