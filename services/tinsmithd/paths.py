"""What checkpoints are called: paths of callers, which are data and never paths of a disk."""

import dataclasses
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

from tinsmithd.owners import inner_id, logged_id, owner_of, public_id
from tinsmithd.text import tag

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A checkpoint's name; matched whole. Names are data and never become paths."""

MODEL_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""A model's id; matched whole."""


class CheckpointKind(StrEnum):
    """TRAINING holds weights and optimizer state, SAMPLER only weights."""

    TRAINING = "training"
    SAMPLER = "sampler"


_SEGMENT = {CheckpointKind.TRAINING: "weights", CheckpointKind.SAMPLER: "sampler_weights"}


_EPHEMERAL_PATTERN = re.compile("ephemeral-[0-9a-f]{16}")


def new_ephemeral_name() -> str:
    """A name for a checkpoint that its user gave none."""
    return f"ephemeral-{secrets.token_hex(8)}"


def is_ephemeral_name(name: str) -> bool:
    """Whether it is one of those; users may take such names, too."""
    return _EPHEMERAL_PATTERN.fullmatch(name) is not None


@dataclass(frozen=True)
class CheckpointPath:
    """`tinsmith://<model>/weights/<name>` or `tinsmith://<model>/sampler_weights/<name>`.

    Attributes:
        model_id: As it is inside, see `owners`: so equal paths of two owners are two paths. Its
            text has no owner in it.
        kind: Of the checkpoint.
        name: Of the checkpoint.
    """

    model_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"tinsmith://{public_id(self.model_id)}/{_SEGMENT[self.kind]}/{self.name}"

    def for_log(self) -> str:
        """As logs have it: without what a caller chose, see `text.tag`."""
        name = self.name if is_ephemeral_name(self.name) else tag(self.name)
        return f"tinsmith://{logged_id(self.model_id)}/{_SEGMENT[self.kind]}/{name}"

    @property
    def owner(self) -> str:
        """Whose it is."""
        return owner_of(self.model_id)

    def of(self, owner: str) -> "CheckpointPath":
        """The same path of an owner."""
        return dataclasses.replace(self, model_id=inner_id(owner, public_id(self.model_id)))

    @classmethod
    def parse(cls, text: str) -> "CheckpointPath":
        """Read a path; `tinker://` is taken too.

        Raises:
            ValueError: The text is not such a path; the message says what is wrong.
        """
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in ("tinsmith", "tinker"):
            raise ValueError("expected tinsmith://<model>/<weights|sampler_weights>/<name>")
        parts = rest.split("/")
        kinds = {segment: kind for kind, segment in _SEGMENT.items()}
        if len(parts) != 3 or parts[1] not in kinds:
            raise ValueError("expected tinsmith://<model>/<weights|sampler_weights>/<name>")
        for what, part, pattern in (
            ("model", parts[0], MODEL_ID_PATTERN),
            ("name", parts[2], NAME_PATTERN),
        ):
            if not pattern.fullmatch(part):
                raise ValueError(f"{what} must match {pattern.pattern}")
        return cls(parts[0], kinds[parts[1]], parts[2])
