"""Spans and log lines of calls: from the client through all servers to the rank, in one trace."""

import http.client
import json
from collections.abc import Iterator, Sequence

import grpc
import numpy as np
import pytest

import tinsmith
from collector import Collected
from tinsmith import types
from watched import Watched

TOKENS = [5, 6, 7, 8]
TREE = {
    ("tinsmith-client", "tinsmith forward_backward"): {
        ("tinsmith-training", "ForwardBackward"),
        ("tinsmith-training", "queue"),
        ("tinsmith-training", "turn"),
        ("tinsmith-training", "journal write"),
        ("tinsmith-training", "ranks compute"),
        ("tinsmith-trainer", "rank compute"),
        ("tinsmith-trainer", "engine compute"),
    },
    ("tinsmith-client", "tinsmith optim_step"): {
        ("tinsmith-training", "OptimStep"),
        ("tinsmith-training", "turn"),
        ("tinsmith-training", "journal write"),
        ("tinsmith-training", "ranks optim_step"),
        ("tinsmith-trainer", "rank optim_step"),
        ("tinsmith-trainer", "engine optimizer step"),
    },
    ("tinsmith-client", "tinsmith save_state"): {
        ("tinsmith-training", "SaveCheckpoint"),
        ("tinsmith-training", "ranks copy_state"),
        ("tinsmith-trainer", "rank copy_state"),
        ("tinsmith-checkpoint", "WriteCheckpoint"),
        ("tinsmith-checkpoint", "write"),
        ("tinsmith-checkpoint", "commit"),
    },
    ("tinsmith-client", "tinsmith sample"): {
        ("tinsmith-sampler", "Sample"),
        ("tinsmith-sampler", "wait"),
        ("tinsmith-sampler", "prefill"),
        ("tinsmith-sampler", "decode"),
    },
}
"""What each call of a client must be seen to go through."""


@pytest.fixture(scope="module")
def traced(watched: Watched) -> Iterator[tuple[Watched, tinsmith.ServiceClient]]:
    """A client that makes spans, as Alice."""
    tinsmith.tracing.enable(watched.collector.endpoint)
    key = watched.keyed.key("alice")
    with tinsmith.ServiceClient(base_url=watched.keyed.cluster.address, api_key=key) as service:
        yield watched, service
    tinsmith.tracing.disable()


def short(span: Collected) -> tuple[str, str]:
    """Who made a span, and its name without the package and service of a method."""
    return span.service, span.name.rpartition("/")[2]


def below(spans: Sequence[Collected], root: Collected) -> list[Collected]:
    """All that is part of a span, however deep, in the same trace."""
    found, ids = [], {root.span_id}
    while more := [s for s in spans if s.parent_id in ids and s.span_id not in ids]:
        found += more
        ids |= {span.span_id for span in more}
    assert {span.trace_id for span in found} <= {root.trace_id}
    return found


def test_a_call_is_one_trace_from_the_client_to_the_rank(
    traced: tuple[Watched, tinsmith.ServiceClient],
) -> None:
    watched, service = traced
    base = watched.keyed.cluster.base_model
    trainer = service.create_lora_training_client(base, rank=2, seed=1).result()
    weights = np.ones(len(TOKENS), np.float32)
    inputs = {"target_tokens": np.array(TOKENS), "weights": weights}
    datum = types.Datum(types.ModelInput.from_ints(TOKENS), inputs)
    trainer.forward_backward([datum], "cross_entropy").result()
    trainer.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    trainer.save_state("one").result()
    sampler = trainer.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS)
    sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=1)).result()

    tinsmith.tracing.disable()  # sends what there is
    for root, wanted in TREE.items():

        def whole(
            spans: Sequence[Collected],
            root: tuple[str, str] = root,
            wanted: set[tuple[str, str]] = wanted,
        ) -> bool:
            roots = [span for span in spans if short(span) == root]
            return bool(roots) and wanted <= {short(each) for each in below(spans, roots[0])}

        watched.collector.until(whole)


def test_a_span_lies_within_the_call_that_it_is_part_of(watched: Watched) -> None:
    spans = watched.collector.spans
    by_id = {span.span_id: span for span in spans}
    parts = [s for s in spans if s.name in ("turn", "ranks compute", "prefill", "decode", "wait")]
    assert parts
    for span in parts:
        assert span.start_ns <= span.end_ns
        if span.parent_id in by_id:
            assert by_id[span.parent_id].start_ns <= span.start_ns


def test_a_request_of_the_gateway_goes_on_with_its_callers_trace(watched: Watched) -> None:
    """And its id is in the answer, in the gateway's log, and in that of the Sampler's call."""
    assert watched.keyed.cluster.gateway_url is not None
    where = watched.keyed.cluster.gateway_url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=60)
    trace = "c" * 32
    headers = {
        "Authorization": f"Bearer {watched.keyed.key('alice')}",
        "Content-Type": "application/json",
        "traceparent": f"00-{trace}-{'d' * 16}-01",
        "X-Request-Id": "my-request.1",
    }
    body = {"model": watched.keyed.cluster.base_model, "prompt": [5, 6], "max_tokens": 2}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    request_id = response.headers["x-request-id"]
    response.read()

    def is_there(spans: Sequence[Collected]) -> bool:
        found = {span.service for span in spans if span.trace_id == trace}
        return found >= {"tinsmith-gateway", "tinsmith-sampler"}

    watched.collector.until(is_there)
    event = watched.until_event(
        "gateway",
        lambda event: event.get("request_id") == request_id and "seconds" in event,
    )
    assert (event["caller_request_id"], event["tenant"]) == ("my-request.1", "alice")
    assert (event["trace_id"], event["code"]) == (trace, 200)
    assert event["sent_bytes"] > 0
    mine = [s for s in watched.collector.spans if s.trace_id == trace and s.name.startswith("POST")]
    assert mine[0].attributes["tinsmith.tenant"] == "alice"


def test_every_line_of_json_is_an_object_that_says_who_wrote_it(watched: Watched) -> None:
    """Of the ranks, too, whom the Training server started."""
    seen = set()
    for name in ("training", "gateway"):
        for line in watched.log(name).splitlines():
            event = json.loads(line)
            assert {"time", "level", "process", "logger", "message"} <= set(event), line
            assert len(line.encode()) < 4096
            seen.add(event["process"])
    assert seen == {"training", "trainer", "gateway"}


def test_a_call_has_a_line_with_status_time_bytes_and_tenant(watched: Watched) -> None:
    stubs = watched.keyed.stubs("bob")
    request = tinsmith.v1.GetModelRequest(model_id="absent-1")
    with pytest.raises(grpc.RpcError) as refusal:
        stubs.training.GetModel(request, metadata=(("x-request-id", "ask-1"),))
    request_id = tinsmith.errors.from_rpc_error(refusal.value).request_id
    event = watched.until_event(
        "training", lambda event: event.get("caller_request_id") == "ask-1" and "code" in event
    )
    assert event["request_id"] == request_id
    assert (event["code"], event["tenant"]) == ("NOT_FOUND", "bob")
    assert event["received_bytes"] == request.ByteSize()
    assert event["logger"] == "tinsmithd.calls"
