"""What this rank gets done, for whoever must tell a long computation from one that hangs.

There is one `current` progress in a process, as there is one rank. It is only counted here:
`process_group.stall` judges.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Of this process.

    Attributes:
        count: Rises with every command, micro-batch, and layer on the way there and back.
        doing: The command under way; empty while the rank waits for one.
    """

    count: int = 0
    doing: str = ""


current = Progress()


def made() -> None:
    """Something was done."""
    current.count += 1


@contextlib.contextmanager
def under_way(command: str) -> Iterator[None]:
    """A command is carried out in the body of the `with`."""
    current.doing = command
    made()
    try:
        yield
    finally:
        made()
        current.doing = ""


def count_layers(layers: Iterable[Any]) -> None:
    """Let each layer count when it was computed, and when a gradient came back through it.

    A micro-batch may rightly take as long as many of them: one datum of a long context has no
    other place to count at. No number of a layer changes.

    Args:
        layers: torch modules whose output is hidden states, or begins with them.
    """
    for layer in layers:
        layer.register_forward_hook(_count_layer)


def _count_layer(_: Any, __: Any, output: Any) -> None:
    made()
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda _: made())
