"""The secret of the rank link: only a rank group that shows it may attach.

It is the content of a file. Rank 0 sends it with each stream that it opens; the Training server
looks at it before anything else of the stream.
"""

import hmac
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from tinsmithd.config import ConfigError

METADATA_KEY = "authorization"
RANKS_KEY = "trainer.link_secret_file"
SERVER_KEY = "training.link_secret_file"
CHARACTERS_MIN, CHARACTERS_MAX = 32, 1024
"""A shorter secret could be guessed; a longer one would not fit into a call's metadata."""
FILE_NAME = "link.secret"
"""Name of the file with the secret that a Training server makes in its data folder."""
_SCHEME = "Bearer "
_READABLE_BY_OTHERS = 0o004

_log = logging.getLogger(__name__)


def read(name: str | Path, key: str) -> str:
    """Read a secret; blanks around it do not count.

    Args:
        name: The file that holds it.
        key: The setting that names the file, for the message.

    Raises:
        ConfigError: It cannot be read, or is no secret: 32 to 1024 visible ASCII characters.
    """
    if not name:
        where = f"a Training server on this machine has {FILE_NAME} in its data_folder"
        raise ConfigError(f"{key}: must be set; {where}")
    file = Path(name)
    try:
        text = file.read_bytes()[: 2 * CHARACTERS_MAX].decode("ascii", errors="replace").strip()
        others = file.stat().st_mode & _READABLE_BY_OTHERS
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {file}: {error.strerror}") from error
    if not CHARACTERS_MIN <= len(text) <= CHARACTERS_MAX:
        message = f"expected {CHARACTERS_MIN} to {CHARACTERS_MAX} characters, as of"
        raise ConfigError(f"{key}: {file}: {message} `openssl rand -hex 32`")
    if not all("!" <= character <= "~" for character in text):
        raise ConfigError(f"{key}: {file}: only visible ASCII characters are allowed")
    if others:
        _log.warning("%s: every user of this machine can read %s", key, file)
    return text


def made_in(folder: Path) -> Path:
    """The file of a folder with a secret of its own, made where there is none.

    It stays over restarts, so that ranks which were started by hand attach again.

    Raises:
        OSError: It cannot be written.
    """
    file = folder / FILE_NAME
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{FILE_NAME}.{secrets.token_hex(8)}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as writing:
            writing.write(f"{secrets.token_hex(32)}\n")
            writing.flush()
            os.fsync(writing.fileno())
        os.replace(part, file)
    return file


def shown(secret: str) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a call that shows a secret."""
    return ((METADATA_KEY, _SCHEME + secret),)


def is_shown(metadata: Sequence[tuple[str, str | bytes]], secret: str) -> bool:
    """Whether a call's metadata show the secret; takes as long for every wrong one."""
    expected = (_SCHEME + secret).encode()
    found = [value for key, value in metadata if key == METADATA_KEY]
    if len(found) != 1:
        return False
    value = found[0].encode(errors="replace") if isinstance(found[0], str) else found[0]
    return hmac.compare_digest(value, expected)
