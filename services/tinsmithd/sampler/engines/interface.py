"""What a sampling engine is: it is given requests, and gives out what each of them makes.

An engine holds one base model and the adapters it was given. Batching, caches and prefill are its
own affair; bounds, fairness and deadlines are admission's. What a request gives depends on the
weights, the prompt, the parameters, the seed and the index of a sequence alone, as far as
`EngineTraits.batch_invariant` says so.

All methods are called on one event loop, which an engine never blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tinsmithd.domain import BaseModelInfo, ModelState, Output, SampleRequest

OnOutput = Callable[[Output], None]
"""Takes what a request made since the last time, on the event loop: it puts it somewhere, which is
a matter of microseconds. Whoever wants to work with it does so elsewhere."""


@dataclass(frozen=True)
class EngineTraits:
    """What an engine says of itself.

    Attributes:
        name: "transformers" or "vllm".
        batch_invariant: No number depends on what else is computed at the same time, bit for bit.
    """

    name: str
    batch_invariant: bool


@dataclass(frozen=True)
class EngineStats:
    """What an engine has in hand, and what it did since it began; 0 where it does not know.

    Attributes:
        sequences: Sequences that are computed now, prompts that are read included.
        waiting: Requests that wait for room.
        kv_tokens, kv_tokens_max: Tokens whose keys and values are held or promised; room for them.
        adapter_bytes: Memory of the adapters.
        steps: Forwards made.
        step_rows: Rows of all of them: `step_rows / steps` is the mean batch.
        prompt_tokens_computed, prompt_tokens_cached: Prompts' tokens that were read, and that the
            prefix cache had.
        sampled_tokens: Tokens drawn.
    """

    sequences: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_tokens_max: int = 0
    adapter_bytes: int = 0
    steps: int = 0
    step_rows: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    sampled_tokens: int = 0


class SamplingEngine(Protocol):
    """Holds one base model and any number of adapters by key."""

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""

    @property
    def traits(self) -> EngineTraits:
        """What this engine is."""

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The base model's own files of its tokenizer, unchanged: file name to content."""

    async def load_adapter(self, key: str, state: ModelState) -> None:
        """Add an adapter under an immutable key; requests under way go on meanwhile.

        Raises:
            FailedPrecondition: It does not fit the base model (INCOMPATIBLE_CHECKPOINT).
        """

    async def unload_adapter(self, key: str) -> None:
        """Drop an adapter that no request under way uses; an unknown key is no error."""

    async def generate(
        self, request: SampleRequest, adapter: str | None, on_output: OnOutput
    ) -> None:
        """Compute a request; `max_tokens` 0 only scores the prompt.

        It gives out the prompt's scores first, where they are asked for, then new tokens as they
        are made, and returns once every sequence has its stop reason. It holds no tokens back while
        a stop string may be under way: the tokens of a stop string are among those given out.

        To cancel it stops the request: at most the step under way is still computed, and nothing is
        given out any more.

        Args:
            request: Checked, with its seed.
            adapter: Key of an adapter that was loaded; None for the base model.
            on_output: Takes what it makes.

        Raises:
            KeyError: There is no such adapter.
            InvalidArgument: It can never fit into this engine's memory (LIMIT_EXCEEDED).
            Unavailable: The engine has failed or is closed (SAMPLER_UNAVAILABLE).
        """

    def stats(self) -> EngineStats:
        """What it has in hand now, and what it did."""

    async def failed(self) -> None:
        """Wait until this engine can compute nothing more: its process should end.

        Raises:
            Exception: What went wrong; it returns only when the engine is closed.
        """

    async def close(self) -> None:
        """End what is under way (Unavailable) and free everything; a second time does nothing."""
