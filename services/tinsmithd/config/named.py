"""Values whose fields are named after settings."""

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from tinsmithd.config.base import Config

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Limits = TypeVar("Limits", bound="DataclassInstance")


def limits_from(kind: type[Limits], config: Config, **others: Any) -> Limits:
    """Fill a dataclass in from the settings that have the names of its fields.

    Args:
        kind: The dataclass.
        config: Has most of its fields.
        others: The rest.

    Raises:
        AttributeError: A field is no setting and not among the others.
    """
    names = {field.name for field in dataclasses.fields(kind)} - others.keys()
    return kind(**{name: getattr(config, name) for name in names}, **others)
