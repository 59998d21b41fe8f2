"""Opens the checkpoints of a folder: the one place that chooses what keeps their bytes."""

from pathlib import Path

from tinsmithd.checkpoint.catalogue import EPOCH_STEP_MAX, Catalogue
from tinsmithd.checkpoint.rules import REAL_CLOCKS, Clocks, Keeper
from tinsmithd.checkpoint.store.directory import DirectoryStore

CATALOGUE_FILE = "catalogue.sqlite"


def open_keeper(
    folder: Path,
    *,
    checkpoint_bytes_max: int,
    lease_s: float = 30.0,
    epoch_step_max: int = EPOCH_STEP_MAX,
    clocks: Clocks = REAL_CLOCKS,
) -> Keeper:
    """The keeper of the checkpoints in a folder on a local disk, empty where there are none.

    Args:
        folder: Where the catalogue and the blobs are.
        checkpoint_bytes_max: Maximum number of bytes in the files of one checkpoint.
        lease_s: How long a lease lasts, seconds.
        epoch_step_max: See `CheckpointConfig.writer_epoch_step_max`.
        clocks: The time of day, and one that nobody sets.

    Raises:
        StoreBusy: Another server has the folder.
        CatalogueUnusable: Nobody can say what is in it.
    """
    store = DirectoryStore(folder)
    try:
        catalogue = Catalogue(
            folder / CATALOGUE_FILE,
            clocks.wall,
            may_be_new=store.empty,
            epoch_step_max=epoch_step_max,
        )
        return Keeper(
            *(store, catalogue),
            checkpoint_bytes_max=checkpoint_bytes_max,
            lease_s=lease_s,
            clocks=clocks,
        )
    except BaseException:
        store.close()
        raise
