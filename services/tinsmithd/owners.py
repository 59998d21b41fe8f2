"""Owners of what there is, and the ids that things have inside the servers.

A tenant's ids are its own: two tenants may choose the same one, and neither hears of the other's.
So inside, in the journal, at the ranks and in the catalogue, a model's id is `owner/id`; callers
see and say the part behind the slash, which no id of theirs can have. What belongs to
`DEFAULT_OWNER` has no such part: it is as it was before there were owners.
"""

import re

from tinsmithd.text import tag

DEFAULT_OWNER = "default"
"""Who has everything while callers have no keys."""
ANY_OWNER = "*"
"""In place of an owner: whoever has it. Only who sees all may say it; no tenant has this name."""
OWNER_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""A tenant's name; matched whole."""
GIVEN_ID_PATTERN = re.compile("[0-9A-Fa-f]{32}")
"""An id that a server drew, but for upper and lower case; matched whole."""


def inner_id(owner: str, model_id: str) -> str:
    """What a model's id is inside the servers."""
    return model_id if owner == DEFAULT_OWNER else f"{owner}/{model_id}"


def said_id(owner: str, said: str) -> str:
    """What an id that a caller says is inside; one that nothing has, if it has a slash."""
    return inner_id(owner, said) if "/" not in said else "/"


def owner_of(inner: str) -> str:
    """Whose an inner id is."""
    return inner.partition("/")[0] if "/" in inner else DEFAULT_OWNER


def public_id(inner: str) -> str:
    """An inner id as its owner says it."""
    return inner.rpartition("/")[2]


def logged_id(inner: str) -> str:
    """An inner id as logs and spans have it: what a caller chose is not in them, see `tag`."""
    said = public_id(inner)
    return inner if GIVEN_ID_PATTERN.fullmatch(said) else inner.removesuffix(said) + tag(said)
