"""What a sampling engine is. The embedded one is `transformers.engine`.

An engine holds one base model and the adapters it was given. Sampling is cut into steps, so that
admission can interleave requests, stream tokens and stop a cancelled request: `start` reads the
prompt, each `step` makes at most one token per unfinished sequence. One thread at a time calls an
engine. The numbers of a request never depend on what else is running.
"""

from collections.abc import Sequence
from typing import Protocol

from tinsmithd.domain import (
    BaseModelInfo,
    ModelState,
    PromptScores,
    SampledTokens,
    SampleRequest,
)


class Generation(Protocol):
    """One running request."""

    @property
    def prompt_scores(self) -> PromptScores | None:
        """Prompt logprobs, when the request asked for any."""

    @property
    def finished(self) -> bool:
        """True once every sequence has its stop reason."""

    def step(self) -> Sequence[SampledTokens]:
        """Make the next token of each unfinished sequence.

        It holds no tokens back while a stop string may be under way: the tokens of a stop string
        are among those that it returns.
        """

    def close(self) -> None:
        """Free the caches; callers may do so at any point, and twice."""


class SamplingEngine(Protocol):
    """Holds one base model and any number of adapters by key."""

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""

    def tokenizer_files(self) -> dict[str, bytes]:
        """The base model's own files of its tokenizer, unchanged: file name to content."""

    def load_adapter(self, key: str, state: ModelState) -> None:
        """Add an adapter under an immutable key.

        Raises:
            FailedPrecondition: It does not fit the base model (INCOMPATIBLE_CHECKPOINT).
        """

    def unload_adapter(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error."""

    def start(self, request: SampleRequest, adapter: str | None) -> Generation:
        """Read the prompt and make ready to sample; `max_tokens` 0 only scores the prompt."""
