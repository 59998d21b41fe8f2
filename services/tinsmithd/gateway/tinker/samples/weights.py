"""What a sampling session samples from, as its id says it."""

import re
from dataclasses import dataclass

from tinsmith.v1 import checkpoint_service_pb2
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.ids import read_sampling_session_id, sampling_session_id_of

_CHECKPOINT = re.compile(r"(tinsmith://[^/\s]+/[a-z_]+/[^/\s]+)#([0-9a-f]{64})")


@dataclass(frozen=True)
class Weights:
    """What is sampled from; it never changes.

    Attributes:
        base_model: Name as the Sampler has it; empty where a checkpoint says it.
        checkpoint_path: As the Checkpoint server has it; empty for the base model itself.
        digest: Content of the checkpoint, 32 bytes.
    """

    base_model: str = ""
    checkpoint_path: str = ""
    digest: bytes = b""

    @classmethod
    def of_checkpoint(cls, found: checkpoint_service_pb2.Checkpoint) -> "Weights":
        """What a path means now, for good."""
        return cls("", found.checkpoint_path, found.digest)

    def sampler_id(self, session_id: str, number: int) -> str:
        """The id of a session's sampler of these weights."""
        text = f"{self.checkpoint_path}#{self.digest.hex()}" if self.checkpoint_path else ""
        return sampling_session_id_of(session_id, number, text or self.base_model)


@dataclass(frozen=True)
class SamplingSession:
    """What a sampling session's id says.

    Attributes:
        sampler_id: The id.
        session_id: The session that it belongs to.
        weights: What it samples from.
    """

    sampler_id: str
    session_id: str
    weights: Weights

    @classmethod
    def read(cls, sampler_id: str) -> "SamplingSession":
        """Read an id.

        Raises:
            Problem: 404, it is none.
        """
        session_id, _, text = read_sampling_session_id(sampler_id)
        found = _CHECKPOINT.fullmatch(text)
        if found is not None:
            weights = Weights("", found[1], bytes.fromhex(found[2]))
        elif text.startswith("tinsmith://") or not text.isprintable():
            message = "sampling_session_id: there is no such sampling session"
            raise Problem(404, message, field="sampling_session_id")
        else:
            weights = Weights(text)
        return cls(sampler_id, session_id, weights)
