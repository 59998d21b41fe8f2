"""Requests of vLLM on one prompt, under way at the same time, as one stream."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError

from tinsmithd.errors import InvalidArgument, Reason, Unavailable


def unavailable(text: str) -> Unavailable:
    """The refusal of an engine that can compute nothing."""
    return Unavailable(text, Reason.SAMPLER_UNAVAILABLE, retry_after_s=1.0)


class Run:
    """Begins on construction, on an event loop; `close` aborts what is not done.

    Args:
        llm: vLLM's `AsyncLLM`.
        name: Another one for each run.
        prompt: Token ids.
        salt: See `SampleRequest.cache_salt`.
        lora: vLLM's `LoRARequest`, or None for the base model.
        params: vLLM's `SamplingParams` of each request.
    """

    def __init__(
        self,
        llm: Any,
        name: str,
        prompt: list[int],
        salt: str,
        lora: Any,
        params: Sequence[Any],
    ) -> None:
        self._llm = llm
        self._salt = salt
        self._made: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(self._follow(place, f"{name}.{place}", prompt, lora, each))
            for place, each in enumerate(params)
        ]

    async def _follow(
        self, place: int, name: str, prompt: list[int], lora: Any, params: Any
    ) -> None:
        try:
            given = tokens_input(prompt)
            if self._salt:
                given["cache_salt"] = self._salt
            outputs = self._llm.generate(given, params, name, lora_request=lora)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._made.put_nowait((place, output))
        except EngineDeadError:
            self.fail(unavailable("the Sampler has failed"))
        except VLLMClientError as error:
            self.fail(InvalidArgument("", f"engine vllm refuses this: {error}"))
        except Exception as error:
            self.fail(error)

    async def next(self) -> list[tuple[int, Any]]:
        """Wait for outputs of vLLM; all that are there, each with its request's place.

        Raises:
            Exception: What one of them failed of.
        """
        made = [await self._made.get()]
        while not self._made.empty():
            made.append(self._made.get_nowait())
        for _, output in made:
            if isinstance(output, Exception):
                raise output
        return made

    def stop(self, place: int) -> None:
        """Abort one request."""
        self._tasks[place].cancel()

    def fail(self, error: Exception) -> None:
        """Let `next` raise this."""
        self._made.put_nowait((-1, error))

    async def close(self) -> None:
        """Abort what is not done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
