"""Keys of callers: the file that has them, who a key stands for, and what that one may do.

Nothing here knows the wire: servers look keys up in a `KeyRing`, `KeyFile` makes and revokes them.
"""

from tinsmithd.keys.callers import (
    ANONYMOUS,
    LIMIT_NAMES,
    Caller,
    Scope,
    acting_for,
    current,
    set_current,
)
from tinsmithd.keys.file import KeyFile, KeyFileError, KeyRecord, NewKey
from tinsmithd.keys.ring import KeyRing

__all__ = [
    "ANONYMOUS",
    "LIMIT_NAMES",
    "Caller",
    "KeyFile",
    "KeyFileError",
    "KeyRecord",
    "KeyRing",
    "NewKey",
    "Scope",
    "acting_for",
    "current",
    "set_current",
]
