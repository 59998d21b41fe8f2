"""What `tinsmith up` does about keys: its servers need one among themselves."""

import os
from pathlib import Path

from tinsmithd.keys import KeyFile, KeyFileError, KeyRing, Scope

FILE_NAME = "cluster.key"
"""Name of the file with that key, in the folder of all data."""


def cluster_key(keys_file: Path, data: Path) -> Path:
    """The file with a key that the servers show each other, made where there is none that is good.

    Args:
        keys_file: The keys of all callers; made where it is not there.
        data: The folder of all data.

    Raises:
        KeyFileError: The file of keys cannot be used.
    """
    file, keys = data / FILE_NAME, KeyFile(keys_file)
    if keys_file.exists() and file.exists():
        caller = KeyRing(keys_file).caller(file.read_text(errors="replace").strip())
        if caller is not None and caller.scope is Scope.SERVER:
            return file
    made = keys.create(scope=Scope.SERVER, note="tinsmith up: the servers among themselves")
    part = data / f".{FILE_NAME}"
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as writing:
            writing.write(made.text + "\n")
        os.replace(part, file)
    except OSError as error:
        raise KeyFileError(f"cannot write {file}: {error.strerror}") from error
    return file
