"""Decides what one forward is made of: continuous batching. One thread uses it.

A step is one forward over the next token of every sequence under way and over pieces of prompts,
one batch of draws, and the checks of what ended. Requests come and leave between two steps. They
are taken in the order in which they came, and prompts that are read take turns by the piece, so a
long one delays a short one by little.

What a request gives depends on none of this: pieces are cut by the prompt alone, rows of a forward
do not depend on each other, and draws are each row's own.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import Output, SampledTokens, TopKLogprobs
from tinsmithd.sampler.engines.interface import EngineStats
from tinsmithd.sampler.engines.transformers import refusals
from tinsmithd.sampler.engines.transformers.jobs import Job, Made, Sequence
from tinsmithd.sampler.engines.transformers.kv import KvCache, Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.model.lora_pool import LoraPool
from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.sampling import Ask, Drawn, Workspace, draw
from tinsmithd.sampler.engines.transformers.scoring import (
    PromptScorer,
    ScoredRows,
    chunks_of,
    gather,
    rows_index,
    score,
)
from tinsmithd.sampler.engines.transformers.start import AnyDecoder

LOOK_EVERY_S = 0.2
BASE_WEIGHTS = ""
"""The cache's key of the base model's weights."""


@dataclass(frozen=True)
class _Piece:
    """A part of a job's prompt, positions `[start, end)`."""

    job: Job
    prompt: Prompt
    start: int
    end: int


@dataclass(frozen=True)
class _Forward:
    """What one forward gave.

    Attributes:
        hidden_TD: Of all rows: one per sequence, then those of the pieces.
        loras: The adapters of all rows.
        sequences: Those of the first rows.
        pieces: Those of the other rows, each with its first row.
    """

    hidden_TD: Tensor
    loras: LoraRows | None
    sequences: Several[Sequence]
    pieces: Several[tuple[int, _Piece]]


class Scheduler:
    """Takes jobs and makes their tokens, a step at a time.

    Args:
        decoder: Computes.
        loras: The adapters.
        cache: Keys and values.
        workspace: Makes memory for draws.
        prefill_tokens_max: Tokens of prompts that one step reads; it may be up to one piece more.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        loras: LoraPool,
        cache: KvCache,
        workspace: Callable[[], Workspace],
        *,
        prefill_tokens_max: int,
    ) -> None:
        self._decoder, self._loras, self._cache = decoder, loras, cache
        self._prefill_tokens_max = prefill_tokens_max
        self._new_workspace, self._workspace = workspace, workspace()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._sequences: dict[SequenceKv, Sequence] = {}
        self._begun: dict[Job, None] = {}
        """Those that have room, wherever they are."""
        self._rows: tuple[list[str | None], int, LoraRows | None] = ([], 0, None)
        """The adapters of the last forward's rows, of which so many were of sequences."""
        self._made: list[Made] = []
        self._steps = self._step_rows = self._sampled_tokens = 0
        self._look()

    def _look(self) -> None:
        """Take note of what the cache holds: counting that takes a while."""
        self._kv, self._looked_s = self._cache.stats, time.monotonic()

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not (self._waiting or self._reading or self._sequences)

    def stats(self) -> EngineStats:
        """What it has in hand, and what it did; any thread may ask. Of KV it knows a bit late."""
        kv = self._kv
        return EngineStats(
            sequences=len(self._sequences) + len(self._reading),
            waiting=len(self._waiting),
            kv_tokens=kv.tokens,
            kv_tokens_max=kv.tokens_max,
            steps=self._steps,
            step_rows=self._step_rows,
            prompt_tokens_computed=kv.prompt_tokens_computed,
            prompt_tokens_cached=kv.prompt_tokens_cached,
            sampled_tokens=self._sampled_tokens,
        )

    # --- in and out ---------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Take a job in; it waits for room."""
        self._waiting.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job wherever it is, and free what it holds; an unknown one is no error."""
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._reading:
            self._reading.remove(job)
        self._begun.pop(job, None)
        if job.prompt is not None:
            self._cache.close_prompt(job.prompt)
            job.prompt = None
        for sequence in job.sequences:
            self._close(sequence)
        job.sequences = []
        if self.idle:
            self._look()

    def _close(self, sequence: Sequence) -> None:
        if self._sequences.pop(sequence.kv, None) is not None:
            self._cache.close_sequence(sequence.kv)

    def _fail(self, job: Job, error: Exception) -> None:
        """End one job; the others do not notice."""
        self.drop(job)
        self._made.append(Made(job, ended=True, error=error))

    def _open_jobs(self) -> None:
        """Give jobs room, in their order."""
        while self._waiting:
            job = self._waiting[0]
            tokens, new = job.request.prompt, job.request.params.max_tokens
            if not self._cache.fits_ever(len(tokens), new, job.samples):
                self._fail(job, refusals.too_large(job))
                continue
            reservation = self._cache.reserve(len(tokens), new, job.samples)
            if reservation is None:
                return
            self._begun[self._waiting.popleft()] = None
            scored = PromptScorer.wanted(job.request)
            job.prompt = self._cache.open_prompt(
                reservation,
                f"{job.request.cache_salt} {job.adapter or BASE_WEIGHTS}",
                tokens,
                cached_tokens_max=job.request.logits_from if scored else None,
            )
            job.scorer = PromptScorer(job.request) if scored else None
            self._reading.append(job)

    def begin_anew(self, why: str) -> list[Made]:
        """After a step that ran out of memory: end the jobs that it may have left half done.

        The largest is refused. The others may be asked for again, and mostly fit then.

        Args:
            why: What the device said.
        """
        jobs, self._begun = list(self._begun), {}
        self._reading.clear()
        self._sequences.clear()
        self._rows, self._workspace = ([], 0, None), self._new_workspace()
        for job in jobs:
            job.prompt, job.sequences = None, []
        self._cache.forget_all()
        self._look()
        largest = max(jobs, key=refusals.tokens_of)
        errors: dict[Job, Exception] = {job: refusals.unavailable(_LATER) for job in jobs}
        errors[largest] = refusals.does_not_fit(largest, why)
        made, self._made = self._made, []  # other jobs had ended in that step
        return made + [Made(job, ended=True, error=error) for job, error in errors.items()]

    # --- a step -------------------------------------------------------------------------------

    def step(self) -> list[Made]:
        """Compute one forward, if anything needs one; returns what came of it."""
        self._made = []
        self._open_jobs()
        pieces, read = self._take_pieces()
        forward = None
        if pieces or self._sequences:
            forward = self._forward(pieces)
            self._score(forward)
        self._draw(forward, read)
        made, self._made = self._made, []
        if self.idle or time.monotonic() > self._looked_s + LOOK_EVERY_S:
            self._look()
        return made

    def _take_pieces(self) -> tuple[list[_Piece], list[Job]]:
        """What is read in this step; and the jobs whose prompts the cache has to the end."""
        pieces: list[_Piece] = []
        read: list[Job] = []
        room = self._prefill_tokens_max
        for _ in range(len(self._reading)):
            if room <= 0:
                break
            job = self._reading.popleft()
            assert job.prompt is not None
            span = self._cache.next_piece(job.prompt)
            if span is not None:
                pieces.append(_Piece(job, job.prompt, *span))
                room -= span[1] - span[0]
            elif job.prompt.read == len(job.prompt.tokens_P):
                read.append(job)
                continue
            self._reading.append(job)
        return pieces, read

    def _forward(self, pieces: Several[_Piece]) -> _Forward:
        spans = [(piece.prompt, piece.start, piece.end) for piece in pieces]
        attend = self._cache.batch(list(self._sequences), spans)
        sequences = [self._sequences[kv] for kv in attend.sequences]
        tokens = [sequence.last_token for sequence in sequences]
        keys = [sequence.job.adapter for sequence in sequences]
        firsts: list[tuple[int, _Piece]] = []
        for piece in pieces:
            firsts.append((len(tokens), piece))
            tokens += piece.prompt.tokens_P[piece.start : piece.end].tolist()
            keys += [piece.job.adapter] * (piece.end - piece.start)
        loras = self._adapters_of(keys, len(sequences))
        tokens_T = torch.tensor(tokens, device=self._decoder.shape.device)
        hidden_TD = self._decoder.forward(
            tokens_T, attend.positions_T, attend, loras, sequences=len(sequences)
        )
        attend.commit()
        self._steps += 1
        self._step_rows += len(tokens)
        return _Forward(hidden_TD, loras, sequences, firsts)

    def _adapters_of(self, keys: list[str | None], sequences: int) -> LoraRows | None:
        """The adapters of rows; mostly they are those of the last rows."""
        if self._rows[:2] != (keys, sequences):
            self._rows = keys, sequences, self._loras.rows(keys, sequences)
        return self._rows[2]

    def _score(self, forward: _Forward) -> None:
        rows: list[ScoredRows] = []
        for first, piece in forward.pieces:
            request, scorer = piece.job.request, piece.job.scorer
            start = max(piece.start, request.logits_from)
            # The last token predicts none of the prompt's.
            end = min(piece.end, len(request.prompt) - 1)
            if scorer is not None and start < end:
                first += start - piece.start
                rows.append(ScoredRows(scorer, first, np.arange(start, end)))
        for chunk in chunks_of(rows):
            index = rows_index(chunk)
            loras = None if forward.loras is None else forward.loras.select(index)
            logits = self._decoder.logits(gather(forward.hidden_TD, index), loras)
            score(logits, chunk, self._workspace)

    # --- draws --------------------------------------------------------------------------------

    def _draw(self, forward: _Forward | None, read: Several[Job]) -> None:
        """Draw the next token of each sequence, and the first ones of prompts that are read."""
        drawing: list[tuple[Sequence, int]] = []
        keys: list[str | None] = []
        hidden: list[Tensor] = []
        if forward is not None and forward.sequences:
            hidden.append(forward.hidden_TD[: len(forward.sequences)])
            keys += [sequence.job.adapter for sequence in forward.sequences]
            drawing += [(sequence, row) for row, sequence in enumerate(forward.sequences)]
        first: dict[Job, Output] = {}
        for job, prompt, last_hidden_d in self._finished(forward, read):
            scores = None if job.scorer is None else job.scorer.scores()
            first[job] = Output(scores, prompt_cache_hit_tokens=prompt.cached)
            begun = self._begin(job, prompt)
            if begun:
                drawing += [(sequence, len(keys)) for sequence in begun]
                keys.append(job.adapter)
                hidden.append(last_hidden_d[None])
        tokens: dict[Job, list[SampledTokens]] = {}
        if drawing:
            hidden_ND = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
            logits_NV = self._decoder.draw_logits(hidden_ND, self._adapters_of(keys, len(keys)))
            asks = [_ask(sequence, row) for sequence, row in drawing]
            for (sequence, _), drawn in zip(
                drawing, draw(logits_NV, asks, self._workspace), strict=True
            ):
                self._take(sequence, drawn, tokens)
        self._report(first, tokens)

    def _finished(
        self, forward: _Forward | None, read: Several[Job]
    ) -> list[tuple[Job, Prompt, Tensor]]:
        """The prompts that are read now, with the last hidden state of each, `(d,)`."""
        found: list[tuple[Job, Prompt, Tensor]] = []
        for job in read:
            assert job.prompt is not None
            assert job.prompt.last_hidden_d is not None
            found.append((job, job.prompt, job.prompt.last_hidden_d))
        for first, piece in () if forward is None else forward.pieces:
            if piece.end == len(piece.prompt.tokens_P):
                assert forward is not None
                last_hidden_d = forward.hidden_TD[first + piece.end - piece.start - 1]
                self._cache.finish(piece.prompt, last_hidden_d)
                self._reading.remove(piece.job)
                found.append((piece.job, piece.prompt, last_hidden_d))
        return found

    def _begin(self, job: Job, prompt: Prompt) -> list[Sequence]:
        """The sequences that continue a prompt; none where it is only scored."""
        if job.samples:
            forks = self._cache.fork(prompt)
            try:
                job.sequences = [Sequence(job, index, kv) for index, kv in enumerate(forks)]
            except Exception as error:  # a stop string may have a tokenizer stumble
                for kv in forks:
                    self._cache.close_sequence(kv)
                self._fail(job, error)
                return []
            self._sequences.update((sequence.kv, sequence) for sequence in job.sequences)
        self._cache.close_prompt(prompt)
        job.prompt = None
        return list(job.sequences)

    def _take(
        self, sequence: Sequence, drawn: Drawn | None, tokens: dict[Job, list[SampledTokens]]
    ) -> None:
        """Give a sequence its next token."""
        job = sequence.job
        if sequence.kv not in self._sequences:
            return  # another sequence of its job failed just now
        if drawn is None:
            self._fail(job, refusals.not_finite(job))
            return
        self._sampled_tokens += 1
        sequence.last_token = drawn.token
        try:
            reason = sequence.stop.add(drawn.token)
        except Exception as error:
            self._fail(job, error)
            return
        topk = None
        if drawn.topk_ids is not None and drawn.topk_logprobs is not None:
            topk = TopKLogprobs(drawn.topk_ids[None], drawn.topk_logprobs[None])
        made = SampledTokens(sequence.index, [drawn.token], [drawn.logprob], reason, topk)
        tokens.setdefault(job, []).append(made)
        if reason is not None:
            self._close(sequence)
            job.sequences.remove(sequence)

    def _report(self, first: dict[Job, Output], tokens: dict[Job, list[SampledTokens]]) -> None:
        failed = {made.job for made in self._made}
        for job in (first.keys() | tokens.keys()) - failed:
            output = first.get(job, _NOTHING)
            if job in tokens:
                output = replace(output, tokens=tokens[job])
            self._made.append(Made(job, output, ended=not job.sequences))
            if not job.sequences:
                del self._begun[job]


_NOTHING = Output()
_LATER = "the Sampler ran out of memory with a larger request beside this one"


def _ask(sequence: Sequence, row: int) -> Ask:
    request = sequence.job.request
    number = sequence.draws.next() if request.params.temperature else 0.0
    return Ask(row, request.params, number, request.topk_sample_logprobs)
