"""The files of a base model's tokenizer, byte for byte as the base model has them.

What another release of transformers saves, older ones may not read: so nothing is saved again.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from tinsmithd.state.files import FULL_CONFIG_FILE, TOKENIZER_FILES


def read_tokenizer_files(name_or_folder: str, tokenizer: Any) -> dict[str, bytes]:
    """Read the files that a tokenizer was loaded from.

    Args:
        name_or_folder: Of the base model. For a Hugging Face name they are those of the snapshot
            that is in the hub's cache.
        tokenizer: The tokenizer, loaded: it is saved only where it has none of the known files.

    Returns:
        File name to content: those of `TOKENIZER_FILES` that there are, and `config.json`, in which
        transformers may look for the tokenizer's class.
    """
    folder = _folder_of(name_or_folder)
    found = _files(folder, TOKENIZER_FILES) or _saved(tokenizer)
    return {**found, **_files(folder, (FULL_CONFIG_FILE,))}


def _folder_of(name_or_folder: str) -> Path:
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    # Loading the model has put it there.
    return Path(cached_file(name_or_folder, FULL_CONFIG_FILE, local_files_only=True)).parent


def _files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    found = {name: folder / name for name in names}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return _files(Path(scratch), TOKENIZER_FILES)
