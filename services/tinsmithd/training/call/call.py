"""A call as the Training server takes it in."""

from dataclasses import dataclass

from tinsmithd.training.call.work import Work


@dataclass(frozen=True)
class Call:
    """What a client asked of one model, once.

    Attributes:
        seq_id: Its number in its model; 0 for a call that runs now and has no number.
        digest: SHA-256 of its content: a repeat has the same.
        work: What it asks for.
        nbytes: Bytes of its data, which the queue and the journal count.
        acknowledge: Whether somebody relies on its being written down before it is its turn.
    """

    seq_id: int
    digest: bytes
    work: Work
    nbytes: int = 0
    acknowledge: bool = False
