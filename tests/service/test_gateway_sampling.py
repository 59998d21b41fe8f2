"""Sampling through the gateway, as HTTP: promises that outlive whoever gave them."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_gateway import ask

from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tinsmith.gateway.v1 import tinker_pb2

PROTOBUF = {"Accept": "application/x-protobuf"}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]}


def new_session(gateway: RunningGateway) -> str:
    """The id of a new session."""
    session: str = ask(gateway, "/api/v1/create_session", {})[1]["session_id"]
    return session


def new_sampler(gateway: RunningGateway, **weights: Any) -> str:
    """The id of a new sampling session."""
    asked = {"session_id": new_session(gateway), "sampling_session_seq_id": 0, **weights}
    status, made = ask(gateway, "/api/v1/create_sampling_session", asked)
    assert status == 200, made
    sampler: str = made["sampling_session_id"]
    return sampler


def asample(gateway: RunningGateway, sampler: str, seq_id: int, **changes: Any) -> dict[str, Any]:
    """The promise of a call."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "num_samples": 2,
        "prompt": PROMPT,
        "sampling_params": {"max_tokens": 6, "stop": []},  # its seed is drawn: none ends early
        **changes,
    }
    status, promise = ask(gateway, "/api/v1/asample", body)
    assert status == 200, promise
    assert len(promise["sample_sequence_ids"]) == body["num_samples"]
    made: dict[str, Any] = promise
    return made


def result(gateway: RunningGateway, promise: dict[str, Any]) -> Any:
    """What a promise comes to, as JSON."""
    status, found = ask(gateway, "/api/v1/retrieve_future", {"request_id": promise["request_id"]})
    assert status == 200, found
    return found


def tokens(found: Any) -> list[list[int]]:
    return [each["tokens"] for each in found["sequences"]]


@pytest.fixture
def sampler(gateway: RunningGateway, cluster: RunningCluster) -> str:
    """A sampling session of the base model."""
    return new_sampler(gateway, base_model=cluster.base_model)


def test_a_call_sent_again_is_the_same_promise_and_its_result_can_be_had_twice(
    gateway: RunningGateway, sampler: str
) -> None:
    """As the SDK's retries send it: same number, same content."""
    first, again = asample(gateway, sampler, 4), asample(gateway, sampler, 4)
    assert first == again
    found = result(gateway, first)
    assert found == result(gateway, again)
    assert all(len(each) == 6 for each in tokens(found))
    assert tokens(found) != tokens(result(gateway, asample(gateway, sampler, 5)))


def test_the_sdk_gets_protobuf_and_others_json(gateway: RunningGateway, sampler: str) -> None:
    """With the same numbers."""
    promise = asample(gateway, sampler, 0, prompt_logprobs=True, topk_prompt_logprobs=2)
    plain = result(gateway, promise)
    packed = raw(gateway, promise["request_id"], PROTOBUF)
    read = tinker_pb2.SampleResponse.FromString(packed)
    assert [list(map(int, memoryview(s.tokens).cast("i"))) for s in read.sequences] == tokens(plain)
    logprobs = memoryview(read.prompt_logprobs).cast("f").tolist()
    assert logprobs[1:] == plain["prompt_logprobs"][1:]
    assert plain["prompt_logprobs"][0] is None
    assert plain["topk_prompt_logprobs"][0] is None


def raw(gateway: RunningGateway, request_id: str, headers: dict[str, str]) -> bytes:
    """The body of a poll."""
    request = urllib.request.Request(
        f"{gateway.url}/api/v1/retrieve_future",
        json.dumps({"request_id": request_id}).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"] == "application/x-protobuf"
        body: bytes = response.read()
        return body


def test_a_gateway_that_was_killed_makes_the_same_tokens(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """Without a seed too: the promise says all, and another gateway reads it as well."""
    with running_gateway(cluster.address, tmp_path / "one") as gateway:
        sampler = new_sampler(gateway, base_model=cluster.base_model)
        promises = [asample(gateway, sampler, number) for number in range(3)]
        before = [tokens(result(gateway, each)) for each in promises]
        gateway.kill()
        gateway.start()
        assert [tokens(result(gateway, each)) for each in promises] == before
        with running_gateway(cluster.address, tmp_path / "two") as other:
            assert [tokens(result(other, each)) for each in promises] == before


def test_a_request_too_large_to_be_carried_is_gone_after_a_restart(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """410: the SDK sends it again."""
    with running_gateway(cluster.address, tmp_path) as gateway:
        sampler = new_sampler(gateway, base_model=cluster.base_model)
        # Larger than the context: it is refused, but only by the Sampler.
        prompt = {"chunks": [{"tokens": list(range(200)) * 60}]}
        promise = asample(gateway, sampler, 0, prompt=prompt)
        assert len(promise["request_id"]) < 1000
        assert result(gateway, promise)["category"] == "user"
        gateway.kill()
        gateway.start()
        asked = {"request_id": promise["request_id"]}
        assert ask(gateway, "/api/v1/retrieve_future", asked)[0] == 410
        again = asample(gateway, sampler, 0, prompt=prompt)
        assert again == promise
        assert result(gateway, again)["category"] == "user"


def test_a_cancelled_call_can_be_had_anew(gateway: RunningGateway, sampler: str) -> None:
    """Its promise is as good as before: somebody else may wait for it."""
    promise = asample(gateway, sampler, 0, sampling_params={"max_tokens": 400, "stop": []})
    asked = {"request_id": promise["request_id"]}
    assert ask(gateway, "/api/v1/cancel_future", asked)[0] == 200
    assert ask(gateway, "/api/v1/cancel_future", {"request_id": "absent"})[0] == 200
    assert [len(each) for each in tokens(result(gateway, promise))] == [400, 400]


def test_what_cannot_be_sampled_from_is_refused_when_the_sampler_is_made(
    gateway: RunningGateway,
) -> None:
    """With the names that there are."""
    session = new_session(gateway)
    for weights, status, field in [
        ({"base_model": "absent"}, 404, "base_model"),
        ({}, 400, "base_model"),
        ({"model_path": "tinker://a/weights"}, 400, "model_path"),
        ({"model_path": "tinker://a/sampler_weights/b"}, 404, None),
        ({"model_path": 7}, 400, "model_path"),
    ]:
        asked = {"session_id": session, "sampling_session_seq_id": 0, **weights}
        found, said = ask(gateway, "/api/v1/create_sampling_session", asked)
        assert (found, said.get("field")) == (status, field), weights
    asked = {"session_id": "absent", "sampling_session_seq_id": 0, "base_model": "tiny-llama"}
    assert ask(gateway, "/api/v1/create_sampling_session", asked)[0] == 404


def test_a_sampler_says_what_it_is(gateway: RunningGateway, sampler: str) -> None:
    """From its id alone."""
    status, found = ask(gateway, f"/api/v1/samplers/{sampler}")
    assert (status, found) == (200, {"sampler_id": sampler, "base_model": "tiny-llama"})
    assert ask(gateway, "/api/v1/samplers/absent")[0] == 404


def test_a_call_may_name_its_weights_itself(
    gateway: RunningGateway, cluster: RunningCluster
) -> None:
    """Without a sampling session, for whoever has none; the seed is the caller's."""
    found = []
    for _ in range(2):
        body = {
            "base_model": cluster.base_model,
            "prompt": PROMPT,
            "sampling_params": {"max_tokens": 5, "seed": 3},
        }
        status, promise = ask(gateway, "/api/v1/asample", body)
        assert status == 200
        found.append(tokens(result(gateway, promise)))
    assert found[0] == found[1]


def poll(gateway: RunningGateway, sampler: str, **more: Any) -> tuple[int, Any]:
    """One poll for all samples of a session."""
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    body = {"target": target, "prev_cursor": 0, "retrieved_request_ids": [], **more}
    return ask(gateway, "/api/v1/retrieve_futures", body)


def test_one_poll_tells_of_all_samples_of_a_session(gateway: RunningGateway, sampler: str) -> None:
    """Each once, with the bytes of its result; one that failed, too."""
    assert poll(gateway, sampler)[0] == 410  # of that session nothing is known here
    promises = [asample(gateway, sampler, number) for number in range(3)]
    long = {"chunks": [{"type": "encoded_text", "tokens": [5] * 5000}]}
    failing = asample(gateway, sampler, 3, prompt=long, num_samples=1)
    cursor, told = 0, {}
    while len(told) < 4:
        status, found = poll(gateway, sampler, prev_cursor=cursor)
        assert status == 200
        assert found["cursor"] > cursor
        cursor = found["cursor"]
        for each in found["completions"]:
            assert each["request_id"] not in told
            told[each["request_id"]] = each
    for promise in promises:
        each = told[promise["request_id"]]
        asked = {"request_id": promise["request_id"], "allow_metadata_only": False}
        body = ask(gateway, "/api/v1/retrieve_future", asked, headers=PROTOBUF)[1]
        assert each["state"] == "finished"
        assert each["response_payload_uncompressed_size"] == len(body)
    assert told[failing["request_id"]]["state"] == "failed"
    assert "error" in result(gateway, failing)
    again = poll(gateway, sampler, prev_cursor=cursor, timeout=0)[1]
    assert again == {"completions": [], "cursor": cursor}
    retrieved = [each["request_id"] for each in promises]
    assert poll(gateway, sampler, prev_cursor=cursor, timeout=0, retrieved_request_ids=retrieved)
    assert poll(gateway, sampler, prev_cursor=5)[0] == 410  # another process's
    assert poll(gateway, sampler, retrieved_request_ids="x")[0] == 400
    assert poll(gateway, "absent")[0] == 404


def test_clones_of_a_sampler_get_numbers_of_their_own(
    gateway: RunningGateway, sampler: str
) -> None:
    """From 1 on; the first one is 0."""
    asked = {"sampling_session_id": sampler, "type": "join_sampling_session"}
    found = [ask(gateway, "/api/v1/join_sampling_session", asked)[1] for _ in range(20)]
    numbers = {each["client_counter"] for each in found}
    assert len(numbers) == 20
    assert all(0 < number < 10**9 for number in numbers)
    asked = {"sampling_session_id": "absent"}
    assert ask(gateway, "/api/v1/join_sampling_session", asked)[0] == 404
