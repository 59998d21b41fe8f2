"""Keepers over one object store, a folder, on clocks that a test moves."""

from pathlib import Path

from checkpoints import LEASE_S, PATH, Clock
from tinsmithd.checkpoint.opening import ObjectPlace, open_keeper
from tinsmithd.checkpoint.rules import Clocks, Keeper
from tinsmithd.domain import CheckpointPath

GRACE_S = 100.0


class Replicas:
    """Keepers by name over one store, all on the same clocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / "objects"
        self.wall, self.monotonic = Clock(), Clock()
        self.opened: dict[str, Keeper] = {}

    def __call__(self, name: str) -> Keeper:
        """One of them, opened when it is first asked for."""
        if name not in self.opened:
            self.opened[name] = open_keeper(
                self.folder / name,
                checkpoint_bytes_max=1 << 30,
                place=ObjectPlace(f"file://{self.objects}", grace_s=GRACE_S),
                lease_s=LEASE_S,
                clocks=Clocks(self.wall, self.monotonic),
            )
        return self.opened[name]

    def close(self, name: str) -> None:
        """Close one."""
        self.opened.pop(name).close()

    def passes(self, seconds: float) -> None:
        """Time passes."""
        self.wall.now_s += seconds
        self.monotonic.now_s += seconds

    def blobs(self) -> int:
        """How many objects there are of files."""
        return sum(path.is_file() for path in (self.objects / "blobs").rglob("*"))


def path(text: str = PATH) -> CheckpointPath:
    """A path of its text."""
    return CheckpointPath.parse(text)


def listed(keeper: Keeper) -> list[tuple[int, str]]:
    """Numbers and paths of all checkpoints, newest first."""
    found, total = keeper.catalogue.page(model_id="", kind=None, before=None, size=1000)
    assert total == len(found)
    return [(checkpoint.number, str(checkpoint.path)) for checkpoint in found]
