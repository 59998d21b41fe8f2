"""What the scheduler knows of a request on its way."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tinsmithd.domain import Output, SampleRequest
from tinsmithd.sampler.engines.stopping import StopCheck
from tinsmithd.sampler.engines.transformers.kv import Prompt, Reservation, SequenceKv
from tinsmithd.sampler.engines.transformers.sampling import Draws
from tinsmithd.sampler.engines.transformers.scoring import PromptScorer


@dataclass(eq=False)
class Job:
    """A request on its way through the scheduler.

    Attributes:
        request: Checked, with its seed.
        adapter: Key of its adapter; None for the base model.
        new_stop_check: Makes what ends one of its sequences.
        reservation: Its room in the cache, until the prompt takes it over.
        prompt: While it is read.
        scorer: Where its prompt is scored.
        sequences: Those that go on.
    """

    request: SampleRequest
    adapter: str | None
    new_stop_check: Callable[[], StopCheck]
    reservation: Reservation | None = None
    prompt: Prompt | None = None
    scorer: PromptScorer | None = None
    sequences: "list[Sequence]" = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of sequences; 0 where the prompt is only scored."""
        return self.request.num_samples if self.request.params.max_tokens else 0


class Sequence:
    """One sample on its way.

    Attributes:
        job: Its request.
        index: Which of the request's it is.
        kv: Its keys and values.
        draws: Its random numbers.
        stop: What ends it.
        last_token: What it read or made last.
    """

    __slots__ = ("draws", "index", "job", "kv", "last_token", "stop")

    def __init__(self, job: Job, index: int, kv: SequenceKv) -> None:
        assert job.request.params.seed is not None  # the servicer draws one
        self.job, self.index, self.kv = job, index, kv
        self.draws = Draws(job.request.params.seed, index)
        self.stop = job.new_stop_check()
        self.last_token = 0


@dataclass(frozen=True)
class Made:
    """What a step made of a job.

    Attributes:
        job: Which.
        output: What is new; None where nothing is.
        ended: Nothing more comes.
        error: Why, where it is no success.
    """

    job: Job
    output: Output | None = None
    ended: bool = False
    error: Exception | None = None
