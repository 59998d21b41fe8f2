"""Opens checkpoints: the one place that chooses what keeps their bytes and their catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tinsmithd.checkpoint.catalogue import (
    EPOCH_STEP_MAX,
    Catalogue,
    LocalTransactions,
    SharedTransactions,
    open_local,
)
from tinsmithd.checkpoint.rules import HOLD_LEASES, REAL_CLOCKS, Clocks, Keeper
from tinsmithd.checkpoint.store import Store, StoreUnusable, whole
from tinsmithd.checkpoint.store.directory import DirectoryStore
from tinsmithd.errors import TinsmithError

CATALOGUE_FILE = "catalogue.sqlite"
VIEW_FILE = "view.sqlite"
GRACE_S = 3600.0


@dataclass(frozen=True)
class ObjectPlace:
    """An object store, see `CheckpointConfig.store_url`.

    Attributes:
        url: Where it is.
        options: What obstore takes for it; may be secret.
        grace_s: See `CheckpointConfig.store_grace_s`.
        authorities: Vouch for it beside those that the machine knows (PEM).
    """

    url: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    grace_s: float = GRACE_S
    authorities: bytes = b""


def open_keeper(
    folder: Path,
    *,
    checkpoint_bytes_max: int,
    place: ObjectPlace | None = None,
    lease_s: float = 30.0,
    epoch_step_max: int = EPOCH_STEP_MAX,
    clocks: Clocks = REAL_CLOCKS,
) -> Keeper:
    """The keeper of the checkpoints in a folder on a local disk, empty where there are none.

    Args:
        folder: Where the catalogue and the blobs are, or of an object store what this server has.
        checkpoint_bytes_max: Maximum number of bytes in the files of one checkpoint.
        place: Where checkpoints are, if they are not in the folder.
        lease_s: How long a lease lasts, seconds.
        epoch_step_max: See `CheckpointConfig.writer_epoch_step_max`.
        clocks: The time of day, and one that nobody sets.

    Raises:
        StoreBusy: Another server has the folder.
        FormatUnknown: A later release wrote it, or made the store.
        StoreUnusable: The object store cannot be used as it is set.
        CatalogueUnusable: Nobody can say what is in it.
    """
    opened = _folder(folder) if place is None else _objects(folder, place, lease_s, clocks)
    store, catalogue = opened[0], Catalogue(opened[1], clocks.wall, epoch_step_max=epoch_step_max)
    try:
        return Keeper(
            *(store, catalogue),
            checkpoint_bytes_max=checkpoint_bytes_max,
            lease_s=lease_s,
            clocks=clocks,
        )
    except BaseException:
        catalogue.close()
        store.close()
        raise


def _folder(folder: Path) -> tuple[Store, LocalTransactions]:
    store = DirectoryStore(folder)
    try:
        return store, open_local(folder / CATALOGUE_FILE, may_be_new=store.empty)
    except BaseException:
        store.close()
        raise


def _objects(
    folder: Path, place: ObjectPlace, lease_s: float, clocks: Clocks
) -> tuple[Store, SharedTransactions]:
    try:
        # Only here, so that a server with a folder needs no obstore.
        from tinsmithd.checkpoint.store.object.bucket import Bucket
        from tinsmithd.checkpoint.store.object.log import ObjectLog
        from tinsmithd.checkpoint.store.object.store import ObjectStore
    except ImportError as error:
        message = f"store_url needs what is not installed: pip install 'tinsmith[s3]' ({error})"
        raise StoreUnusable(message) from error
    if (folder / CATALOGUE_FILE).exists():
        message = f"{folder} has checkpoints of its own, which store_url would hide"
        raise StoreUnusable(f"{message}: name another data_folder")
    bucket = Bucket(place.url, place.options, place.authorities)
    store = ObjectStore(bucket, folder, grace_s=place.grace_s, monotonic=clocks.monotonic)
    try:
        log = ObjectLog(bucket)
        hold_s = HOLD_LEASES * lease_s
        return store, SharedTransactions(
            folder / VIEW_FILE, log, hold_s=hold_s, monotonic=clocks.monotonic
        )
    except TinsmithError as error:
        store.close()
        raise StoreUnusable(f"{place.url}: {whole(error)}") from error
    except BaseException:
        store.close()
        raise
