"""The embedded sampling engine: continuous batching on one thread of its own.

That thread takes what came and what was cancelled, has the scheduler make a step, and hands what
came of it to the event loop, once per step. Adapters are loaded on another thread. What fails one
request ends that alone; what fails a step ends the engine, since nobody knows in what state it is.
After one that ran out of memory it begins anew, without the requests that were under way.
"""

import asyncio
import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from tinsmithd.completion_text import CONTEXT_TOKENS
from tinsmithd.domain import BaseModelInfo, ModelState, SampleRequest
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky
from tinsmithd.sampler.engines.interface import EngineStats, EngineTraits, OnOutput
from tinsmithd.sampler.engines.stopping import StopCheck
from tinsmithd.sampler.engines.transformers.jobs import Job, Made
from tinsmithd.sampler.engines.transformers.kv import KvCache
from tinsmithd.sampler.engines.transformers.refusals import adapter_does_not_fit, unavailable
from tinsmithd.sampler.engines.transformers.scheduler import Scheduler
from tinsmithd.sampler.engines.transformers.start import NativeUse, start

PIECE_TOKENS = 256
"""Maximum tokens of a prompt that are read at once."""
WOKEN_AT_ONCE = 4
"""Callers that hear of their first tokens or their end at the same moment. What each of them does
then takes up to a millisecond, and whoever else needs the event loop waits for all of it."""
TOLD_AT_ONCE = 64
"""Callers whose tokens are put aside at the same moment, which takes microseconds."""
CHUNK_TOKENS = 64
"""Prompts are kept in chunks that begin at multiples of this."""
SPEED_UP_AFTER_S = 0.25
"""How long an adapter waits to be made faster, so that this does not slow its first tokens down."""

_FAILED = "the Sampler has failed"

_log = logging.getLogger(__name__)
_computes = threading.Lock()
"""Whose turn it is to compute, of several engines in one process: they share what `Head` sets."""


@dataclass(frozen=True)
class EngineLimits:
    """Sizes; the names are those of the settings."""

    kv_cache_bytes_max: int = 1 << 30
    prefix_cache_bytes_max: int = 1 << 28
    prefill_tokens_per_step_max: int = 512
    batch_rows_max: int = 256
    keep_rows_apart: bool = True
    native: NativeUse = "exact"
    native_folder: str = ""


class _Stream:
    """Where one request's caller waits, on the event loop that runs now.

    Attributes:
        bell: That of the event loop.
        ended: Done once nothing more comes; cancelled where the caller gave up.
    """

    def __init__(self, bell: "_Bell", on_output: OnOutput) -> None:
        self.bell = bell
        self.ended: asyncio.Future[None] = bell.loop.create_future()
        self._on_output = on_output
        self._begun = False

    def take(self, made: Made) -> bool:
        """Give out what was made; returns whether somebody is woken by it."""
        if self.ended.done():
            return False
        wakes, self._begun = made.ended or not self._begun, True
        try:
            if made.output is not None:
                self._on_output(made.output)
        except Exception as error:
            self.ended.set_exception(error)
            return True
        if made.error is not None:
            self.ended.set_exception(made.error)
        elif made.ended:
            self.ended.set_result(None)
        return wakes


class _Bell:
    """Tells callers on one event loop what was made, in order, some at a time.

    Args:
        loop: Theirs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pairs: deque[tuple[_Stream, Made]] = deque()
        self._rings = False

    def take(self, pairs: Sequence[tuple[_Stream, Made]]) -> None:
        """Take what a step made; any thread may call it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
            self.loop.call_soon_threadsafe(self._add, pairs)

    def _add(self, pairs: Sequence[tuple[_Stream, Made]]) -> None:
        self._pairs.extend(pairs)
        if not self._rings:
            self._ring()

    def _ring(self) -> None:
        """Tell the first callers, and let the event loop look at all else before the next ones."""
        woken = 0
        for _ in range(min(TOLD_AT_ONCE, len(self._pairs))):
            stream, made = self._pairs.popleft()
            woken += stream.take(made)
            if woken == WOKEN_AT_ONCE:
                break
        self._rings = bool(self._pairs)
        if self._rings:
            self.loop.call_soon(self._ring)


class TransformersEngine:
    """See `SamplingEngine`.

    Args:
        base: A base model of a supported family; its weights are taken over.
        limits: See the settings.

    Raises:
        NotFound: It cannot be computed as transformers does (BASE_MODEL_NOT_FOUND).
    """

    def __init__(self, base: BaseModel, limits: EngineLimits | None = None) -> None:
        limits = limits or EngineLimits()
        self._base = base
        self._eos_ids = _eos_ids(base)
        rows_max = limits.batch_rows_max + limits.prefill_tokens_per_step_max + PIECE_TOKENS
        with _computes:
            self._started = built = start(
                base,
                rows_max=rows_max,
                keep_rows_apart=limits.keep_rows_apart,
                native=limits.native,
                native_folder=limits.native_folder,
                on_progress=_log.info,
            )
        self._pool = built.pool
        cache = KvCache(
            built.decoder.shape,
            bytes_max=limits.kv_cache_bytes_max,
            prefix_bytes_max=limits.prefix_cache_bytes_max,
            chunk_tokens=CHUNK_TOKENS,
            piece_tokens=PIECE_TOKENS,
        )
        self._traits = EngineTraits("transformers", built.rows_apart and cache.invariant)
        self._scheduler = Scheduler(
            built.decoder,
            built.pool,
            cache,
            built.workspace,
            prefill_tokens_max=limits.prefill_tokens_per_step_max,
        )
        self._adapter_bytes: dict[str, int] = {}
        # What the thread is to do first: a job, and whether it comes or goes.
        self._commands: deque[tuple[Job, bool]] = deque()
        self._streams: dict[Job, _Stream] = {}
        self._bell: _Bell | None = None
        self._wake = threading.Event()
        self._closing = False
        self._broken: Exception | None = None
        self._ended: Future[None] = Future()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    @property
    def traits(self) -> EngineTraits:
        """What this engine is."""
        return self._traits

    def stats(self) -> EngineStats:
        """What it has in hand, and what it did; numbers of a step under way may be half there."""
        return replace(self._scheduler.stats(), adapter_bytes=sum(self._adapter_bytes.values()))

    async def tokenizer_files(self) -> dict[str, bytes]:
        """The base model's own files of its tokenizer: file name to content."""
        return dict(self._base.tokenizer_files)

    async def load_adapter(self, key: str, state: ModelState) -> None:
        """Add an adapter under an immutable key."""
        loop = asyncio.get_running_loop()
        try:
            nbytes = await loop.run_in_executor(self._loader, self._pool.load, key, state)
        except (RuntimeError, MemoryError) as error:
            raise self._no_load(error) from error
        self._adapter_bytes[key] = nbytes
        loop.call_later(SPEED_UP_AFTER_S, self._speed_up, key)

    def _no_load(self, error: RuntimeError | MemoryError) -> Exception:
        """What to tell whose adapter was not loaded; with the device gone the engine ends."""
        if is_sticky(error):
            self._broken = error
            self._wake.set()
            return unavailable(_FAILED)
        return adapter_does_not_fit() if is_out_of_memory(error) else error

    def _speed_up(self, key: str) -> None:
        """Make an adapter a little faster, and then go on: one that is to be loaded comes first."""
        if not self._closing:
            loop = asyncio.get_running_loop()
            step = loop.run_in_executor(self._loader, self._pool.speed_up, key)
            step.add_done_callback(functools.partial(self._go_on, key))

    def _go_on(self, key: str, step: asyncio.Future[bool]) -> None:
        if not step.cancelled() and step.exception() is None and step.result():
            self._speed_up(key)

    async def unload_adapter(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error."""
        self._adapter_bytes.pop(key, None)
        self._pool.unload(key)

    async def failed(self) -> None:
        """Wait until this engine can compute nothing more; see `SamplingEngine`."""
        await asyncio.shield(asyncio.wrap_future(self._ended))

    async def close(self) -> None:
        """End what is under way, the thread, and the loading."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)
        self._started.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    # --- requests -----------------------------------------------------------------------------

    async def generate(
        self, request: SampleRequest, adapter: str | None, on_output: OnOutput
    ) -> None:
        """Compute a request; see `SamplingEngine`."""
        if adapter is not None and adapter not in self._adapter_bytes:
            raise KeyError(adapter)
        job = Job(request, adapter, functools.partial(self._stop_check, request))
        stream = self._streams[job] = _Stream(self._here(), on_output)
        self._tell(job, comes=True)
        try:
            await stream.ended
        finally:
            if self._streams.pop(job, None) is not None:
                self._tell(job, comes=False)

    def _here(self) -> _Bell:
        """The bell of the event loop that runs now; mostly it is the same one."""
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = _Bell(loop)
        return self._bell

    def _tell(self, job: Job, *, comes: bool) -> None:
        self._commands.append((job, comes))
        self._wake.set()
        if self._ended.done():
            self._answer([job])

    def _stop_check(self, request: SampleRequest) -> StopCheck:
        context = request.prompt[-max(CONTEXT_TOKENS) :].tolist()
        return StopCheck(request.params, self._eos_ids, self._decode, context)

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaned-up text would lose the space before a dot, and so miss a stop string.
        text: str = self._base.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._run_once()
        except BaseException as error:
            _log.exception("the engine failed")
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)
        self._answer(list(self._streams))

    def _run_once(self) -> None:
        scheduler = self._scheduler
        if scheduler.idle:
            self._wake.wait()
        self._wake.clear()
        if self._broken is not None:
            raise self._broken
        while self._commands:
            job, comes = self._commands.popleft()
            if comes:
                scheduler.add(job)
            else:
                scheduler.drop(job)
        if not scheduler.idle:
            self._post(self._step())

    def _step(self) -> Sequence[Made]:
        try:
            with _computes:
                return self._scheduler.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).partition("\n")[0]
        # Inside the handler this would free little: the error holds frames, which hold tensors.
        _log.error("a step ran out of memory, and all requests that were under way end: %s", why)
        made = self._scheduler.begin_anew(why)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return made

    def _post(self, made: Sequence[Made]) -> None:
        """Hand what was made to the callers' event loops: mostly there is one, and one call."""
        by_bell: dict[_Bell, list[tuple[_Stream, Made]]] = {}
        for each in made:
            # Whoever ended is not told to go once more.
            find = self._streams.pop if each.ended else self._streams.get
            stream = find(each.job, None)
            if stream is not None:
                by_bell.setdefault(stream.bell, []).append((stream, each))
        for bell, pairs in by_bell.items():
            bell.take(pairs)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Tell the callers of jobs that nothing comes of them any more."""
        error = unavailable("the Sampler is stopping" if self._closing else _FAILED)
        self._post([Made(job, ended=True, error=error) for job in jobs])


def _eos_ids(base: BaseModel) -> frozenset[int]:
    """The model's end-of-sequence tokens, from the first of its files that names them."""
    for source in (base.model.generation_config, base.model.config, base.tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
