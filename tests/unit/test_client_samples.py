"""What `sample` takes beside a prompt, and gives beside tokens: as the SDK does."""

import asyncio
from typing import Any

import numpy as np
import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import tensors, types
from tinsmith._samples import Samples
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd import domain
from tinsmithd.convert.sampler import output_to_pb
from tinsmithd.sampler.unread import Unread

PROMPT = tinsmith.ModelInput.from_ints([1, 2, 3])
TARGETS = types.TensorData([[4, -1], [5, 6]])


@pytest.fixture
def sampler(peer: Peer) -> tinsmith.SamplingClient:
    service = tinsmith.ServiceClient(base_url=peer.address)
    return service.create_sampling_client(base_model="base").result(10)


def sent(peer: Peer, sampler: tinsmith.SamplingClient, **arguments: Any) -> pb.SampleRequest:
    """What goes to the server."""
    sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1), **arguments).result(10)
    return pb.SampleRequest.FromString(peer.servicer.recorded[-1])


# --- what goes in ---------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"topk_sample_logprobs": -1}, "topk_sample_logprobs", "INVALID_FIELD"),
    ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k", "INVALID_FIELD"),
    ({"prompt_logprobs_last_n": 1}, "include_prompt_logprobs", "MISSING_FIELD"),
    (
        {"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True},
        "prompt_logprobs_last_n",
        "INVALID_FIELD",
    ),
    ({"target_prompt_logprobs": [[1, 2]]}, "target_prompt_logprobs", "INVALID_FIELD"),
    (
        {"target_prompt_logprobs": types.TensorData([[1.0], [2.0]])},
        "target_prompt_logprobs",
        "INVALID_DTYPE",
    ),
    (
        {"target_prompt_logprobs": types.TensorData([1, 2])},
        "target_prompt_logprobs",
        "INVALID_SHAPE",
    ),
]


@pytest.mark.parametrize(("arguments", "field", "reason"), REFUSED)
def test_what_the_sdk_checks_is_refused_at_once(
    peer: Peer, sampler: tinsmith.SamplingClient, arguments: Any, field: str, reason: str
) -> None:
    """By its name; nothing is sent."""
    before = len(peer.servicer.recorded)
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1), **arguments)
    assert (refusal.value.field, refusal.value.reason) == (field, reason)
    assert len(peer.servicer.recorded) == before


def test_who_wants_whole_answers_lets_tokens_gather(
    peer: Peer, sampler: tinsmith.SamplingClient
) -> None:
    """`sample` does, `sample_stream` does not."""
    sampler.sample(PROMPT).result(10)
    assert {said.get("tinsmith-gather-s") for said in peer.servicer.sample_metadata} == {"10"}
    peer.servicer.sample_metadata.clear()
    list(sampler.sample_stream(PROMPT))
    assert {said.get("tinsmith-gather-s") for said in peer.servicer.sample_metadata} == {None}


def test_last_n_of_compute_logprobs_is_at_least_1(sampler: tinsmith.SamplingClient) -> None:
    """It needs no other argument."""
    with pytest.raises(tinsmith.InvalidArgumentError, match="prompt_logprobs_last_n"):
        sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=0)


def test_arguments_are_sent_under_their_names(peer: Peer, sampler: tinsmith.SamplingClient) -> None:
    """And what is not given is not sent."""
    request = sent(
        peer,
        sampler,
        include_prompt_logprobs=True,
        topk_sample_logprobs=3,
        prompt_alt_tokens_k=4,
        prompt_logprobs_last_n=2,
        target_prompt_logprobs=TARGETS,
    )
    assert (request.topk_sample_logprobs, request.prompt_alt_tokens_k) == (3, 4)
    assert request.prompt_logprobs_last_n == 2
    assert tensors.decode(request.target_prompt_logprobs).tolist() == [[4, -1], [5, 6]]
    plain = sent(peer, sampler)
    assert not plain.HasField("prompt_logprobs_last_n")
    assert not plain.HasField("target_prompt_logprobs")
    sampler.compute_logprobs(PROMPT, 2).result(10)
    computed = pb.ComputeLogprobsRequest.FromString(peer.servicer.recorded[-1])
    assert computed.prompt_logprobs_last_n == 2


def test_targets_are_the_same_dense_sparse_and_of_torch(
    peer: Peer, sampler: tinsmith.SamplingClient
) -> None:
    """Empty cells are -1, token 0 is a token; what int32 cannot carry goes as it is."""
    torch = pytest.importorskip("torch")
    dense = torch.tensor([[0, -1, 7], [-1, -1, 0]])
    sparse = types.TensorData(
        [0, 7, 0],
        "int64",
        [2, 3],
        sparse_crow_indices=[0, 2, 3],
        sparse_col_indices=np.array([0, 2, 2]),
    )
    for given in (
        types.TensorData.from_torch(dense),
        types.TensorData.from_torch_sparse(dense, pad_value=-1),
        sparse,
    ):
        request = sent(peer, sampler, target_prompt_logprobs=given)
        found = tensors.decode(request.target_prompt_logprobs)
        assert (found.tolist(), found.dtype) == (dense.tolist(), np.int32)
    large = sent(peer, sampler, target_prompt_logprobs=types.TensorData([[2**40], [1]]))
    assert tensors.decode(large.target_prompt_logprobs).tolist() == [[2**40], [1]]


# --- sparse arrays --------------------------------------------------------------------------------


def sparse(
    crow: Any = (0, 2, 3), col: Any = (0, 2, 2), shape: Any = (2, 3), data: Any = (1, 7, 2)
) -> types.TensorData:
    return types.TensorData(
        list(data), "int64", shape, sparse_crow_indices=crow, sparse_col_indices=col
    )


def test_a_sparse_array_is_dense_with_any_padding() -> None:
    """0 where nothing is said."""
    made = sparse()
    assert made.tolist() == made.to_numpy().tolist() == [[1, 0, 7], [0, 0, 2]]
    assert made.to_numpy(pad_value=-100).tolist() == [[1, -100, 7], [-100, -100, 2]]
    assert made.shape == [2, 3]
    assert sparse((0, 0), (), (1, 4), ()).to_numpy(5).tolist() == [[5] * 4]
    assert made == sparse() != types.TensorData([[1, 0, 7], [0, 0, 2]])
    for array in (made.to_numpy(), made.to_numpy(-1), np.asarray(made)):
        array[0, 0] = 9  # the caller's own
    assert made.tolist() == [[1, 0, 7], [0, 0, 2]]
    assert not made.view().flags.writeable
    assert (made.sparse_crow_indices, made.sparse_col_indices) == ([0, 2, 3], [0, 2, 2])
    assert made.data == [1, 7, 2]
    with pytest.raises(tinsmith.InvalidArgumentError, match="pad_value"):
        made.to_numpy(0.5)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("sparse_crow_indices", {"crow": (0, 2)}),
        ("sparse_crow_indices", {"crow": (0, 2, 4)}),
        ("sparse_crow_indices", {"crow": (0, 2, 2)}),
        ("sparse_crow_indices", {"crow": (1, 2, 3)}),
        ("sparse_crow_indices", {"crow": (0, 3, 1, 3), "shape": (3, 3)}),
        ("sparse_crow_indices", {"crow": (0, -1, 3)}),
        ("sparse_crow_indices", {"crow": None}),
        ("sparse_crow_indices", {"crow": [[0, 2, 3]]}),
        ("sparse_col_indices", {"col": (0, 2, 3)}),
        ("sparse_col_indices", {"col": (0, -1, 2)}),
        ("sparse_col_indices", {"col": (0, 2)}),
        ("sparse_col_indices", {"col": (1, 1, 2)}),
        ("sparse_col_indices", {"col": (0.5, 1.5, 2.5)}),
        ("sparse_col_indices", {"col": [[1], [1, 2]]}),
        ("shape", {"shape": None}),
        ("shape", {"shape": (2, 3, 1)}),
        ("shape", {"shape": (2, -3)}),
        ("shape", {"shape": (2, 2**40)}),
    ],
)
def test_indices_that_contradict_are_refused(field: str, arguments: Any) -> None:
    """By the name of the argument; a few indices ask for no endless memory."""
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        sparse(**arguments)
    assert refusal.value.field == field


# --- what comes back ------------------------------------------------------------------------------


def table(rows: int, first: int = 0) -> domain.TopKLogprobs:
    """Two tokens for each row; the second cell of the last row is empty."""
    ids = np.arange(first, first + 2 * rows).reshape(rows, 2)
    logprobs = -np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    ids[-1, 1], logprobs[-1, 1] = 0, np.nan
    return domain.TopKLogprobs(ids, logprobs)


def received(*outputs: domain.Output, num_samples: int = 1) -> types.SampleResponse:
    """What the client makes of outputs of an engine, by way of the buffer and the messages."""

    async def by_the_wire() -> types.SampleResponse:
        unread, samples = Unread(), Samples(num_samples)
        for output in outputs:
            unread.put(output)
        unread.end()
        async for output in unread.read(lambda: 0.0):
            message = output_to_pb(output, tensor_format=0)
            samples.add(pb.SampleResponse.FromString(message.SerializeToString()))
        return samples.result()

    return asyncio.run(by_the_wire())


def test_top_k_of_samples_comes_in_order_and_trimmed() -> None:
    """Gathered over any number of outputs; an empty cell is (0, -99999) in the array only."""
    first = domain.SampledTokens(1, [5], [-1.0], topk=table(1))
    others = domain.SampledTokens(0, [8], [-3.0], domain.StopReason.STOP, topk=table(1, 50))
    last = domain.SampledTokens(1, [6, 7], [-2.0, -4.0], domain.StopReason.LENGTH, table(2, 10))
    response = received(
        domain.Output(tokens=[first], prompt_cache_hit_tokens=12),
        domain.Output(tokens=[last, others]),
        num_samples=2,
    )
    sequence = response.sequences[1]
    assert sequence.tokens == [5, 6, 7]
    assert (sequence.tokens_np.dtype, sequence.logprobs_np.dtype) == (np.int32, np.float32)
    assert sequence.topk_logprobs_np is not None
    assert sequence.topk_logprobs_np.token_ids.tolist() == [[0, 0], [10, 11], [12, 0]]
    assert sequence.topk_logprobs_np.logprobs[2, 1] == -99999.0
    assert sequence.topk_logprobs == [[(0, 0.0)], [(10, 0.0), (11, -1.0)], [(12, -2.0)]]
    assert response.sequences[0].topk_logprobs == [[(50, 0.0)]]
    assert response.prompt_cache_hit_tokens == 12
    assert len({sequence.sequence_id for sequence in response.sequences}) == 2


def test_scores_of_a_prompt_come_back_as_they_were_made() -> None:
    """What was not asked for is None."""
    prompt = np.array([np.nan, -0.5, -1.5], np.float32)
    topk = domain.TopKLogprobs(
        np.array([[0, 0], [3, 4], [5, 6]]), np.array([[np.nan] * 2, [-1, -2], [-3, -4]], np.float32)
    )
    targets = np.array([[-0.25, 0.0], [-1.0, -2.0]], np.float32)
    drawn = domain.AltTokens(np.array([[7, 7], [8, 9]]), np.full((2, 2), -0.75, np.float32))
    response = received(
        domain.Output(prompt_scores=domain.PromptScores(prompt, topk, targets, drawn))
    )
    assert response.prompt_logprobs == [None, -0.5, -1.5]
    assert response.topk_prompt_logprobs == [None, [(3, -1.0), (4, -2.0)], [(5, -3.0), (6, -4.0)]]
    assert response.target_prompt_logprobs == types.TensorData(targets)
    assert response.prompt_alt_tokens == types.PromptAltTokens(
        np.array([[7, 7], [8, 9]]), np.full((2, 2), -0.75, np.float32)
    )
    assert response.prompt_alt_tokens.tokens.dtype == np.int64
    only = received(domain.Output(prompt_scores=domain.PromptScores(targets=targets)))
    assert only.target_prompt_logprobs == types.TensorData(targets)
    assert only.prompt_logprobs is only.topk_prompt_logprobs is only.prompt_alt_tokens is None
