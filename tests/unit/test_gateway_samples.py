"""What `asample` is read as, and what its answer is written as, against the SDK's numbers."""

from typing import Any

import numpy as np
import pytest

from tinsmith import tensors
from tinsmith.gateway.v1 import tinker_pb2
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker import paths
from tinsmithd.gateway.tinker.samples.answers import EMPTY_LOGPROB, Answer, as_json
from tinsmithd.gateway.tinker.samples.requests import derived_seed, read_sample, sequence_ids
from tinsmithd.gateway.tinker.samples.weights import SamplingSession, Weights


def body(**changes: Any) -> dict[str, Any]:
    """A body as SDK 0.38 sends it."""
    return {
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 4, "temperature": 1, "top_k": -1, "top_p": 1},
        "sampling_session_id": "s",
        "seq_id": 0,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
        **changes,
    }


def params(**changes: Any) -> dict[str, Any]:
    return body(sampling_params=changes)


def test_a_body_is_read_whole() -> None:
    """Chunks follow each other; every parameter arrives."""
    chunks = [{"type": "encoded_text", "tokens": [1]}, {"type": "encoded_text", "tokens": [2, 3]}]
    sent = body(
        prompt={"chunks": chunks},
        prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=4,
        prompt_alt_tokens_k=5,
        prompt_logprobs_last_n=2,
        sampling_params={"max_tokens": 9, "seed": -1, "stop": ["a"], "temperature": 0.5}
        | {"top_k": 7, "top_p": 0.25},
    )
    request = read_sample(sent).request
    assert tensors.decode(request.prompt.chunks[0].tokens).tolist() == [1, 2, 3]
    counts = (request.topk_prompt_logprobs, request.topk_sample_logprobs)
    assert (*counts, request.prompt_alt_tokens_k, request.prompt_logprobs_last_n) == (3, 4, 5, 2)
    drawn = request.sampling_params
    assert (drawn.max_tokens, drawn.temperature, drawn.top_k, drawn.top_p) == (9, 0.5, 7, 0.25)
    assert drawn.seed == 2**63 - 2  # folded, as the SDK's comment says


@pytest.mark.parametrize(
    ("stop", "strings", "tokens", "eos"),
    [
        ("x", ["x"], [], True),
        (["x", "y"], ["x", "y"], [], True),
        ([7, 8], [], [7, 8], True),
        ([], [], [], False),
    ],
)
def test_stops(stop: Any, strings: list[str], tokens: list[int], eos: bool) -> None:
    """An empty list never stops; with others the model's own ends count too."""
    read = read_sample(params(stop=stop)).request.sampling_params.stop
    assert (list(read.strings), list(read.tokens), read.eos) == (strings, tokens, eos)
    assert not read_sample(params(stop=None)).request.sampling_params.HasField("stop")


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (body(prompt={}), "prompt.chunks"),
        (body(prompt={"chunks": []}), "prompt"),
        (body(prompt={"chunks": [{"type": "encoded_text", "tokens": []}]}), "prompt"),
        (body(prompt={"chunks": [7]}), "prompt.chunks[0].type"),
        (body(prompt={"chunks": [{"type": "image", "data": "x"}]}), "prompt.chunks[0].type"),
        (body(prompt={"chunks": [{"tokens": [1, True]}]}), "prompt.chunks[0].tokens"),
        (body(prompt={"chunks": [{"tokens": [1, -1]}]}), "prompt.chunks[0].tokens"),
        (body(prompt={"chunks": [{"tokens": [2**31]}]}), "prompt.chunks[0].tokens"),
        (body(prompt={"chunks": [{"tokens": [10**400]}]}), "prompt.chunks[0].tokens"),
        (body(prompt={"chunks": [{"tokens": [1.5]}]}), "prompt.chunks[0].tokens"),
        (body(num_samples=0), "num_samples"),
        (body(num_samples=2**31), "num_samples"),
        (body(num_samples="2"), "num_samples"),
        (body(topk_prompt_logprobs=-1), "topk_prompt_logprobs"),
        (body(prompt_logprobs="yes"), "prompt_logprobs"),
        (body(prompt_logprobs_last_n=2), "prompt_logprobs"),
        (body(record_stability_info=True), "record_stability_info"),
        (body(of_tomorrow=1), "of_tomorrow"),
        (params(of_tomorrow="x"), "sampling_params.of_tomorrow"),
        (params(max_tokens=2**63), "sampling_params.max_tokens"),
        (params(max_tokens=0), "sampling_params.max_tokens"),
        (params(max_tokens=1.0), "sampling_params.max_tokens"),
        (params(seed="1"), "sampling_params.seed"),
        (params(temperature="hot"), "sampling_params.temperature"),
        (params(top_p=10**400), "sampling_params.top_p"),
        (params(stop=7), "sampling_params.stop"),
        (params(stop=["a", 1]), "sampling_params.stop"),
        (params(stop=[10**30]), "sampling_params.stop"),
        (body(sampling_params=[]), "sampling_params"),
    ],
)
def test_what_is_wrong_is_named(sent: dict[str, Any], field: str) -> None:
    """At once, with the field."""
    with pytest.raises(Problem) as caught:
        read_sample(sent)
    assert (caught.value.status, caught.value.field) == (400, field)


def test_fields_of_tomorrow_that_ask_for_nothing_are_taken() -> None:
    """A newer SDK sends its defaults."""
    read_sample(body(of_tomorrow=False, another=None, third=[], fourth=0))


def sparse(rows: int, cells: list[tuple[int, int, int]], columns: int) -> dict[str, Any]:
    """Targets as CSR, of (row, column, token) in order of rows."""
    counts = np.bincount([row for row, _, _ in cells], minlength=rows)
    return {
        "data": [token for _, _, token in cells],
        "dtype": "int64",
        "shape": [rows, columns],
        "sparse_crow_indices": [0, *np.cumsum(counts).tolist()],
        "sparse_col_indices": [column for _, column, _ in cells],
    }


def test_sparse_targets_are_pushed_together_and_put_back() -> None:
    """However wide the matrix is said to be, its cells alone are asked for."""
    cells = [(0, 900_000, 11), (1, 3, 12), (1, 7, 13)]
    asked = read_sample(body(target_prompt_logprobs=sparse(2, cells, 1_000_000)))
    sent = tensors.decode(asked.request.target_prompt_logprobs)
    assert sent.tolist() == [[11, -1], [12, 13]]
    answer = Answer(1, asked.layout)
    scores = np.array([[-1.0, 0.0], [-2.0, -3.0]], np.float32)
    reply = pb.SampleResponse()
    tensors.write(reply.prompt_logprobs.target_logprobs, scores)
    answer.add(reply)
    made = answer.message().target_prompt_logprobs
    assert list(made.shape) == [2, 1_000_000]
    assert np.frombuffer(made.sparse_csr.values, "<f4").tolist() == [-1.0, -2.0, -3.0]
    assert np.frombuffer(made.sparse_csr.col_indices, "<i8").tolist() == [900_000, 3, 7]
    assert np.frombuffer(made.sparse_csr.crow_indices, "<i8").tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3, 4]},
        {"shape": [2, 0]},
        {"shape": [2, 2**62]},
        {"shape": [2]},
        {"sparse_crow_indices": [0, 3, 2]},
        {"sparse_crow_indices": [0, 2]},
        {"sparse_crow_indices": [1, 2, 3]},
        {"sparse_crow_indices": []},
        {"sparse_col_indices": [0, 1]},
        {"sparse_col_indices": [0, 1, 9]},
        {"sparse_col_indices": [0, 1, -1]},
        {"data": [1, 2]},
        {"data": "x"},
        {"dtype": "float32"},
    ],
)
def test_targets_that_contradict_themselves_are_refused(change: dict[str, Any]) -> None:
    """Before anything of their size is made."""
    targets = {**sparse(2, [(0, 0, 1), (1, 1, 2), (1, 2, 3)], 4), **change}
    with pytest.raises(Problem) as caught:
        read_sample(body(target_prompt_logprobs=targets))
    assert caught.value.field.startswith("target_prompt_logprobs")


def test_an_answer_has_the_numbers_of_the_stream() -> None:
    """Pieces of a sequence follow each other; empty cells are what the SDK takes for empty."""
    answer = Answer(2)
    first = pb.SampleResponse(prompt_cache_hit_tokens=2)
    nan = np.float32(np.nan)
    tensors.write(first.prompt_logprobs.logprobs, np.array([nan, -0.5, -1.5], np.float32))
    tensors.write(first.prompt_logprobs.topk_token_ids, np.array([[0], [9], [8]], np.int32))
    tensors.write(
        first.prompt_logprobs.topk_logprobs, np.array([[nan], [-0.25], [-0.125]], np.float32)
    )
    for index, tokens, reason in [
        (0, [4], pb.STOP_REASON_UNSPECIFIED),
        (1, [6], pb.STOP_REASON_LENGTH),
        (0, [5], pb.STOP_REASON_STOP),
    ]:
        delta = first.deltas.add(sequence_index=index, stop_reason=reason)
        tensors.write(delta.tokens, np.array(tokens, np.int64))
        tensors.write(delta.logprobs, np.array([-float(tokens[0])], np.float32))
    answer.add(first)
    made = answer.message()
    read = as_json(tinker_pb2.SampleResponse.FromString(made.SerializeToString()))
    assert [each["tokens"] for each in read["sequences"]] == [[4, 5], [6]]
    assert [each["logprobs"] for each in read["sequences"]] == [[-4.0, -5.0], [-6.0]]
    assert [each["stop_reason"] for each in read["sequences"]] == ["stop", "length"]
    assert read["prompt_logprobs"] == [None, -0.5, -1.5]
    assert read["topk_prompt_logprobs"] == [None, [(9, -0.25)], [(8, -0.125)]]
    assert read["prompt_cache_hit_tokens"] == 2
    empty = np.frombuffer(made.topk_prompt_logprobs.logprobs, "<f4")[0]
    assert empty == np.float32(EMPTY_LOGPROB)


def test_a_call_without_a_seed_has_one_of_its_own() -> None:
    """The same one whoever makes it; another one for another call."""
    assert derived_seed("s", 1) == derived_seed("s", 1)
    assert len({derived_seed("s", n) for n in range(100)} | {derived_seed("t", 1)}) == 101
    assert len({*sequence_ids("s", 1, 3), *sequence_ids("s", 2, 3), *sequence_ids("t", 1, 3)}) == 9


def test_a_samplers_id_says_what_it_samples_from() -> None:
    """Any gateway reads it; one that was changed is none."""
    session_id = "s-" + "0" * 32
    path = f"tinsmith://{session_id}:train:0/sampler_weights/a"
    for weights in (Weights("Qwen/Qwen3-8B"), Weights("", path, bytes(range(32)))):
        read = SamplingSession.read(weights.sampler_id(session_id, 3))
        assert (read.session_id, read.weights) == (session_id, weights)
        assert "/" not in read.sampler_id
    text = Weights("", path, bytes(32)).sampler_id(session_id, 0)
    for wrong in (text[:-9], f"{session_id}:sample:0:", "x", f"{session_id}:sample:-1:eA"):
        with pytest.raises(Problem) as caught:
            SamplingSession.read(wrong)
        assert caught.value.status == 404


def test_paths_are_those_of_the_sdk_outside_and_the_servers_inside() -> None:
    """Both schemes are taken; external weights are a Sampler's under a name of their own."""
    for sent, inside, outside in [
        ("tinker://r/weights/a", "tinsmith://r/weights/a", "tinker://r/weights/a"),
        ("tinsmith://r/weights/a", "tinsmith://r/weights/a", "tinker://r/weights/a"),
        (
            "tinker://r:train:0/external_weights/a",
            "tinsmith://r:train:0/sampler_weights/external.a",
            "tinker://r:train:0/external_weights/a",
        ),
    ]:
        assert paths.stored(sent, "path") == inside
        assert paths.shown(inside) == outside
    for wrong in (
        "",
        "r/weights/a",
        "tinker://r/weights",
        "tinker://r/others/a",
        "tinker://r/a/b/c",
    ):
        with pytest.raises(Problem):
            paths.stored(wrong, "path")
