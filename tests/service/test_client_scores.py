"""What can be asked of the Sampler beside tokens comes back as the SDK has it."""

import numpy as np
import pytest

import tinsmith
from clusters import RunningCluster
from tinsmith import ModelInput, SamplingParams

PROMPT = ModelInput.from_ints([5, 6, 7, 8, 9])


def test_all_that_is_asked_beside_tokens_comes_back(
    service: tinsmith.ServiceClient, cluster: RunningCluster
) -> None:
    """Shapes and types as the SDK has them; numbers agree with each other."""
    sampler = service.create_sampling_client(base_model=cluster.base_model).result()
    targets = np.array([[6, -1], [7, 11], [-1, 8], [9, 9]])
    answer = sampler.sample(
        PROMPT,
        2,
        SamplingParams(max_tokens=3, seed=7, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=tinsmith.TensorData(targets),
        prompt_alt_tokens_k=4,
        prompt_logprobs_last_n=2,
    ).result()
    scored = answer.prompt_logprobs
    assert scored is not None
    assert [value is None for value in scored] == [True] * 3 + [False] * 2
    assert scored == sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
    assert answer.topk_prompt_logprobs is not None
    assert [row is None for row in answer.topk_prompt_logprobs] == [True] * 3 + [False] * 2
    assert answer.target_prompt_logprobs is not None
    found = answer.target_prompt_logprobs.to_numpy()
    assert (found.shape, found.dtype) == (targets.shape, np.float32)
    assert ((found == 0) == (targets == -1)).all()
    assert found[3].tolist() == [scored[4]] * 2
    asked = tinsmith.TensorData(
        [6, 7, 11, 8], "int64", [4, 2], sparse_crow_indices=[0, 1, 3, 4, 4],
        sparse_col_indices=[0, 0, 1, 1],
    )  # fmt: skip
    sparse = sampler.sample(
        PROMPT, 1, SamplingParams(max_tokens=1), target_prompt_logprobs=asked
    ).result().target_prompt_logprobs  # fmt: skip
    assert sparse is not None
    assert sparse.sparse_crow_indices == asked.sparse_crow_indices
    assert sparse.sparse_col_indices == asked.sparse_col_indices
    assert sparse.data == [found[0, 0], found[1, 0], found[1, 1], found[2, 1]]
    assert (sparse.to_numpy(1.0)[3] == 1).all()
    whole = sampler.compute_logprobs(PROMPT).result()
    assert [found[0, 0], found[1, 0], found[2, 1]] == whole[1:4]
    drawn = answer.prompt_alt_tokens
    assert drawn is not None
    assert drawn.tokens.shape == drawn.logprobs.shape == (4, 4)
    for sequence in answer.sequences:
        assert sequence.topk_logprobs is not None
        for token, logprob, row in zip(
            sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
        ):
            assert row is not None
            assert len(row) == 3
            assert [value for _, value in row] == sorted((v for _, v in row), reverse=True)
            assert dict(row).get(token, logprob) == pytest.approx(logprob, abs=1e-6)
