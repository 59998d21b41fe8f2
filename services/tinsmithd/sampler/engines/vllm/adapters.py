"""Adapters as folders that vLLM reads, when it has room and as often as it needs to."""

import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tinsmithd.domain import ModelState
from tinsmithd.sampler.engines.vllm.base import AdaptableLayers, misfit
from tinsmithd.state import files as state_files

PIECE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter on disk.

    Attributes:
        number: What vLLM calls it; never used for another one.
        path: Its folder.
        nbytes: Bytes of its weights.
    """

    number: int
    path: Path
    nbytes: int


class AdapterFolders:
    """Writes adapters into a private folder that goes with this object.

    Args:
        layers: What an adapter can stand on.
        rank_max: The largest rank that vLLM has room for.
    """

    def __init__(self, layers: AdaptableLayers, rank_max: int) -> None:
        self._layers = layers
        self._rank_max = rank_max
        # Only this user may enter it.
        self._root = tempfile.TemporaryDirectory(prefix="tinsmith-vllm-")
        self._numbers = itertools.count(1)

    def write(self, state: ModelState) -> AdapterFolder:
        """Check an adapter and write it; takes as long as the disk.

        Raises:
            FailedPrecondition: It does not fit (INCOMPATIBLE_CHECKPOINT).
        """
        modules = self._layers.check(state)
        rank = state.tuning.adapter_rank
        if rank > self._rank_max:
            raise misfit(f"the checkpoint has rank {rank}, vllm_rank_max is {self._rank_max}")
        number = next(self._numbers)
        path = Path(self._root.name) / str(number)
        path.mkdir()
        with (path / state_files.WEIGHTS_FILE).open("wb") as weights:
            for name, data in state_files.to_pieces(state, PIECE_BYTES):
                if name == state_files.WEIGHTS_FILE:
                    weights.write(data)
        # What a checkpoint's own file says beside these is for its trainer, or was made up.
        config = {
            "peft_type": "LORA",
            "bias": "none",
            "target_modules": modules,
            **state.tuning.config_entries,
        }
        (path / state_files.PEFT_CONFIG_FILE).write_text(json.dumps(config))
        return AdapterFolder(number, path, sum(a.nbytes for a in state.weights.values()))

    def remove(self, folder: AdapterFolder) -> None:
        """Remove an adapter's folder; one that is gone is no error."""
        shutil.rmtree(folder.path, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        self._root.cleanup()
