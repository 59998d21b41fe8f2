"""The files of a base model's tokenizer, byte for byte as the base model has them.

An older release of transformers may not read what a newer one saves, so nothing is saved again.
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
        name_or_folder: Name or folder of the base model. Files of a Hugging Face name come from the
            hub's cache.
        tokenizer: The loaded tokenizer, which is saved only if there are none of the known files.

    Returns:
        File name to content: those of `TOKENIZER_FILES` that exist, and `config.json`, in which
        transformers may look for the tokenizer's class.
    """
    folder = _folder_of(name_or_folder)
    found = _files(folder, TOKENIZER_FILES) or _saved(tokenizer)
    return {**found, **_files(folder, (FULL_CONFIG_FILE,))}


def _folder_of(name_or_folder: str) -> Path:
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    # Loading the model has put the file there.
    return Path(cached_file(name_or_folder, FULL_CONFIG_FILE, local_files_only=True)).parent


def _files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    found = {name: folder / name for name in names}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return _files(Path(scratch), TOKENIZER_FILES)
