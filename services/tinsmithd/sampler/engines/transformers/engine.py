"""The embedded sampling engine: transformers with PEFT adapters and a KV cache.

Each request is a batch of its own: all its samples share one reading of the prompt. What it
computes depends on the request alone, so its numbers cannot depend on its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tinsmithd.domain import (
    BaseModelInfo,
    ModelState,
    PromptScores,
    SampledTokens,
    SampleRequest,
    TopKLogprobs,
)
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.trained import HeadLayer
from tinsmithd.sampler.engines.interface import Generation
from tinsmithd.sampler.engines.transformers.sampling import Draws, draw
from tinsmithd.sampler.engines.transformers.stopping import StopCheck

HEAD_CHUNK_TOKENS = 256
"""Maximum prompt positions whose logits are made at once."""


class _Sequence:
    """One sample on its way."""

    def __init__(self, index: int, request: SampleRequest, stop: StopCheck) -> None:
        assert request.params.seed is not None  # the servicer draws one
        self.index = index
        self.draws = Draws(request.params.seed, index)
        self.stop = stop
        self.last_token = 0


class TransformersGeneration:
    """See `Generation`."""

    def __init__(
        self, adapters: Adapters, adapter: str | None, request: SampleRequest, stops: Any
    ) -> None:
        self._adapters = adapters
        self._adapter = adapter
        self._request = request
        self._sequences = [_Sequence(i, request, stops()) for i in range(request.num_samples)]
        self._cache: Any = DynamicCache()
        self._prompt_scores: PromptScores | None = None
        self._next_logits: torch.Tensor | None = None
        self._read_prompt()
        if request.params.max_tokens == 0:
            self._sequences = []

    @property
    def prompt_scores(self) -> PromptScores | None:
        """Prompt logprobs, when the request asked for any."""
        return self._prompt_scores

    @property
    def finished(self) -> bool:
        """True once every sequence has its stop reason."""
        return not self._sequences

    @torch.inference_mode()
    def _read_prompt(self) -> None:
        request = self._request
        with self._adapters.active(self._adapter) as model:
            head = self._adapters.head(self._adapter)
            tokens = torch.tensor(request.prompt, device=model.device)[None]
            hidden = model.model(
                input_ids=tokens, past_key_values=self._cache, use_cache=True
            ).last_hidden_state[0]
            if request.include_prompt_logprobs or request.topk_prompt_logprobs:
                topk = request.topk_prompt_logprobs
                self._prompt_scores = score_prompt(head, hidden, tokens[0], topk)
            self._next_logits = head.logits(hidden[-1:]).cpu()

    @torch.inference_mode()
    def step(self) -> Sequence[SampledTokens]:
        """Make the next token of each unfinished sequence."""
        if not self._sequences:
            return []
        logits = self._next_logits
        if logits is None:
            with self._adapters.active(self._adapter) as model:
                last = [[sequence.last_token] for sequence in self._sequences]
                hidden = model.model(
                    input_ids=torch.tensor(last, device=model.device),
                    past_key_values=self._cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                logits = self._adapters.head(self._adapter).logits(hidden).cpu()
        elif len(self._sequences) > 1:
            # All first tokens come from the one reading of the prompt.
            logits = logits.expand(len(self._sequences), -1)
            self._cache.batch_repeat_interleave(len(self._sequences))
        self._next_logits = None
        made = [self._make(s, logits[i]) for i, s in enumerate(self._sequences)]
        going_on = [i for i, tokens in enumerate(made) if tokens.stop_reason is None]
        if going_on and len(going_on) < len(made):
            self._cache.batch_select_indices(torch.tensor(going_on))
        self._sequences = [self._sequences[i] for i in going_on]
        return made

    def _make(self, sequence: _Sequence, logits: torch.Tensor) -> SampledTokens:
        token, logprob = draw(logits, self._request.params, sequence.draws)
        sequence.last_token = token
        return SampledTokens(sequence.index, [token], [logprob], sequence.stop.add(token))

    def close(self) -> None:
        """Free the caches."""
        self._sequences = []
        self._cache = self._next_logits = None


def score_prompt(
    head: HeadLayer, hidden: torch.Tensor, tokens: torch.Tensor, topk: int
) -> PromptScores:
    """Compute the logprobs of a prompt at temperature 1 in float32, a piece at a time.

    Args:
        head: The layer that makes logits of hidden states.
        hidden: Last hidden states, `(P, H)`.
        tokens: The prompt, int64 `(P,)`.
        topk: Number of most likely tokens to return at each position.
    """
    count = len(tokens)
    logprobs = np.full(count, np.nan, np.float32)
    ids = np.zeros((count, topk), np.int64)
    values = np.full((count, topk), np.nan, np.float32)
    for start in range(0, count - 1, HEAD_CHUNK_TOKENS):
        end = min(start + HEAD_CHUNK_TOKENS, count - 1)
        logits = head.logits(hidden[start:end])
        norm = logits.logsumexp(1, keepdim=True)
        here = slice(start + 1, end + 1)
        chosen = logits.gather(1, tokens[here, None]) - norm
        logprobs[here] = chosen[:, 0].cpu().numpy()
        if topk:
            best = logits.topk(topk, dim=1)
            ids[here] = best.indices.cpu().numpy()
            values[here] = (best.values - norm).cpu().numpy()
    return PromptScores(logprobs, TopKLogprobs(ids, values) if topk else None)


class TransformersEngine:
    """See `SamplingEngine`."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._adapters = Adapters(base, fused=True)
        self._eos_ids = _eos_ids(base)

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._base.info

    def tokenizer_files(self) -> dict[str, bytes]:
        """The base model's own files of its tokenizer: file name to content."""
        return dict(self._base.tokenizer_files)

    def load_adapter(self, key: str, state: ModelState) -> None:
        """Add an adapter under an immutable key."""
        self._adapters.add_state(key, state)

    def unload_adapter(self, key: str) -> None:
        """Drop an adapter; an unknown key is no error."""
        self._adapters.remove(key)

    def start(self, request: SampleRequest, adapter: str | None) -> Generation:
        """Read the prompt and make ready to sample."""

        prompt = request.prompt.tolist()

        def stop_check() -> StopCheck:
            return StopCheck(request.params, self._eos_ids, self._decode, prompt)

        return TransformersGeneration(self._adapters, adapter, request, stop_check)

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaned-up text would lose the space before a dot, and so miss a stop string.
        text: str = self._base.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text


def _eos_ids(base: BaseModel) -> frozenset[int]:
    """The model's end-of-sequence tokens, from the first of its files that names them."""
    for source in (base.model.generation_config, base.model.config, base.tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
