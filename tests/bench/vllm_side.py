"""The other side of the rows beside vLLM: its own `LLM` in a process of its own; see `remote`."""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams, TokensPrompt

from tinsmithd.sampler.engines.vllm.opening import OWNER_VARIABLE

KV_CACHE_BYTES = 1 << 30
CONTEXT_TOKENS = 2048


class Vllm:
    """One base model in bfloat16, as vLLM starts it by itself but for `enforce_eager`.

    Compiling takes minutes here. By itself vLLM keeps one of two cores free for its own work; with
    both for products it made half of the tokens.

    Args:
        folder: The model.
        settings: More arguments of `LLM`.
    """

    def __init__(self, folder: str, **settings: Any) -> None:
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        self._llm = LLM(
            folder,
            dtype="bfloat16",
            max_model_len=CONTEXT_TOKENS,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            # It ends vLLM's processes with this one, and does nothing else here.
            worker_extension_cls="tinsmithd.sampler.engines.vllm.workers.WorkerExtension",
            **{"enforce_eager": True, **settings},
        )

    def generate(self, calls: Sequence[tuple[Sequence[int], int, int]]) -> int:
        """Sample at temperature 1, all calls at once.

        Args:
            calls: Prompt, new tokens of each sequence, and number of sequences, of each.

        Returns:
            Tokens made.
        """
        prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt, _, _ in calls]
        params = [
            SamplingParams(n=samples, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            for _, new_tokens, samples in calls
        ]
        made = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(sequence.token_ids) for answer in made for sequence in answer.outputs)
