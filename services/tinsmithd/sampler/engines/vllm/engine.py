"""The engine over vLLM's own asynchronous engine, which batches, caches and computes.

A request for n samples is n requests of vLLM's, which share the prompt in its prefix cache. Stop
strings are looked for here, token by token, as in the other engine; vLLM is told to stop then.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from tinsmithd.completion_text import CONTEXT_TOKENS
from tinsmithd.domain import (
    BaseModelInfo,
    ModelState,
    Output,
    PromptScores,
    SampledTokens,
    SampleRequest,
)
from tinsmithd.sampler.engines.interface import EngineStats, EngineTraits, OnOutput
from tinsmithd.sampler.engines.stopping import StopCheck
from tinsmithd.sampler.engines.vllm.adapters import AdapterFolder, AdapterFolders
from tinsmithd.sampler.engines.vllm.base import misfit, read_base
from tinsmithd.sampler.engines.vllm.counts import Counts
from tinsmithd.sampler.engines.vllm.outputs import prompt_scores, sampled_logprobs
from tinsmithd.sampler.engines.vllm.params import check_request, scoring_params, sequence_params
from tinsmithd.sampler.engines.vllm.run import Run, unavailable
from tinsmithd.sampler.engines.vllm.settings import VllmSettings
from tinsmithd.sampler.engines.vllm.start import is_batch_invariant, start
from tinsmithd.sampler.engines.vllm.workers import WorkerExtension

FAILURE_CHECK_S = 0.5
"""How often the engine looks whether vLLM lives."""


class VllmEngine:
    """See `SamplingEngine`. Construct it in a thread: it takes as long as vLLM takes to start.

    Args:
        name_or_folder: Hugging Face name, or a folder in its format.
        settings: See there.

    Raises:
        NotFound: There is no such model, or something in it is not supported
            (BASE_MODEL_NOT_FOUND).
        RuntimeError: vLLM did not start; its log says why.
    """

    def __init__(self, name_or_folder: str, settings: VllmSettings) -> None:
        base = read_base(name_or_folder).within(settings.context_tokens_max)
        self._counts = Counts()
        self._llm = start(base, settings, self._counts)
        config = self._llm.vllm_config
        self._base = base.loaded(str(config.model_config.dtype).removeprefix("torch."))
        blocks = config.cache_config.num_gpu_blocks or 0
        self._counts.has_room_for(blocks * config.cache_config.block_size)
        self._folders = AdapterFolders(base.adaptable, settings.rank_max)
        self._loaded: dict[str, AdapterFolder] = {}
        self._names = itertools.count()
        self._runs: set[Run] = set()
        self._closed = False
        self._mended: asyncio.Task[object] | None = None

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    @property
    def traits(self) -> EngineTraits:
        """What this engine is."""
        return EngineTraits("vllm", is_batch_invariant())

    def stats(self) -> EngineStats:
        """What it has in hand, as vLLM said last, and what it did."""
        return self._counts.stats(sum(each.nbytes for each in self._loaded.values()))

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The base model's own files of its tokenizer: file name to content."""
        return dict(self._base.tokenizer_files)

    async def failed(self) -> None:
        """Wait until vLLM is dead or this engine closed; see `SamplingEngine`."""
        while not self._closed:
            if self._llm.errored:
                raise self._llm.dead_error
            await asyncio.sleep(FAILURE_CHECK_S)

    async def close(self) -> None:
        """End what is under way, vLLM's processes, and the adapters' files."""
        if self._closed:
            return
        self._closed = True
        for run in self._runs:
            run.fail(unavailable("the Sampler is stopping"))
        await asyncio.to_thread(self._llm.shutdown)
        self._folders.close()

    # --- adapters -----------------------------------------------------------------------------

    async def load_adapter(self, key: str, state: ModelState) -> None:
        """Add an adapter under an immutable key; vLLM reads it between two of its steps."""
        folder = await asyncio.to_thread(self._folders.write, state)
        try:
            await self._llm.add_lora(_lora(key, folder))
        except BaseException as error:
            self._folders.remove(folder)
            if isinstance(error, EngineDeadError):
                raise unavailable("the Sampler has failed") from error
            if isinstance(error, Exception):
                raise misfit(f"vLLM does not read this adapter: {error}") from error
            raise
        self._loaded[key] = folder

    async def unload_adapter(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error."""
        folder = self._loaded.pop(key, None)
        if folder is not None:
            with contextlib.suppress(EngineDeadError):
                await self._llm.remove_lora(folder.number)
            self._folders.remove(folder)

    # --- requests -----------------------------------------------------------------------------

    async def generate(
        self, request: SampleRequest, adapter: str | None, on_output: OnOutput
    ) -> None:
        """Compute a request; see `SamplingEngine`.

        Raises:
            InvalidArgument: vLLM would answer otherwise than it is asked; the field says where.
        """
        lora = None if adapter is None else _lora(adapter, self._loaded[adapter])
        check_request(request)
        await self._mend_scoring()
        if request.include_prompt_logprobs or request.topk_prompt_logprobs:
            on_output(Output(prompt_scores=await self._score(request, lora)))
        if request.params.max_tokens:
            await self._sample(request, lora, on_output)

    async def _mend_scoring(self) -> None:
        """Do so before the first request; there was no event loop to do so on construction."""
        if self._mended is None:
            name = WorkerExtension.tinsmith_mend_scoring.__name__
            self._mended = asyncio.ensure_future(self._llm.collective_rpc(name))
        await asyncio.shield(self._mended)

    async def _score(self, request: SampleRequest, lora: LoRARequest | None) -> PromptScores:
        if len(request.prompt) == 1:
            return prompt_scores(None, request)
        async with self._running(request, lora, [scoring_params(request)]) as run:
            ((_, output),) = await run.next()
            return prompt_scores(output.prompt_logprobs, request)

    async def _sample(
        self, request: SampleRequest, lora: LoRARequest | None, on_output: OnOutput
    ) -> None:
        places = range(request.num_samples)
        wanted = [sequence_params(request, place, self._base.eos_ids) for place in places]
        checks = {place: self._stop_check(request) for place in places}
        cached: int | None = None
        async with self._running(request, lora, wanted) as run:
            while checks:
                made: list[SampledTokens] = []
                for place, output in await run.next():
                    if cached is None:
                        cached = output.num_cached_tokens or 0
                    if place in checks:
                        made.append(_until_stop(place, output, checks[place], request))
                        if made[-1].stop_reason is not None:
                            del checks[place]
                            run.stop(place)
                if made:
                    on_output(Output(tokens=made, prompt_cache_hit_tokens=cached or 0))
                    cached = 0

    @contextlib.asynccontextmanager
    async def _running(
        self, request: SampleRequest, lora: LoRARequest | None, params: list[object]
    ) -> AsyncIterator[Run]:
        if self._closed:
            raise unavailable("the Sampler is stopping")
        prompt = (request.prompt.tolist(), request.cache_salt)
        run = Run(self._llm, str(next(self._names)), *prompt, lora, params)
        self._runs.add(run)
        try:
            yield run
        finally:
            self._runs.discard(run)
            await run.close()

    def _stop_check(self, request: SampleRequest) -> StopCheck:
        context = request.prompt[-max(CONTEXT_TOKENS) :].tolist()
        return StopCheck(request.params, self._base.eos_ids, self._base.decode, context)


def _lora(key: str, folder: AdapterFolder) -> LoRARequest:
    """What vLLM calls an adapter; its prefix cache goes by the name, which stands for content."""
    return LoRARequest(lora_name=key, lora_int_id=folder.number, lora_path=str(folder.path))


def _until_stop(
    place: int, output: object, stop: StopCheck, request: SampleRequest
) -> SampledTokens:
    """The new tokens of a sequence up to the one that ends it."""
    completion = output.outputs[0]  # type: ignore[attr-defined]
    tokens: list[int] = []
    reason = None
    for token in completion.token_ids:
        tokens.append(token)
        reason = stop.add(token)
        if reason is not None:
            break
    if reason is None and output.finished:  # type: ignore[attr-defined]
        raise unavailable(f"vLLM ended a sequence early: {completion.finish_reason}")
    k = request.topk_sample_logprobs
    logprobs, topk = sampled_logprobs(completion.logprobs, len(tokens), k)
    return SampledTokens(place, tokens, logprobs, reason, topk)
