"""What a tenant wrote is in no log, no metric, no span, and in no answer to another tenant.

Every text of every request carries a canary: a word that is nowhere else. So do headers, metadata,
keys, names, prompts and chats. Then everything that the cluster said is searched for it, at the
level DEBUG, in both forms of a log. What a call that succeeded with a canary for a name leaves in
the answers to its own tenant is that tenant's.
"""

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import tinsmith
from attack.requests import ENDLESS
from attack.test_texts import METHODS, places, put
from clusters import children
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.keys import showing
from training_calls import call, datum, forward_backward
from watched import JSON, Watched

CANARY = "canary4711"
LOWER = CANARY.encode()
DEADLINE_S = 20


def made(channel: grpc.Channel, method: MethodDescriptor, request: Message) -> bytes:
    """Make a call of one message; all that is said to its caller."""
    kind = ("stream" if method.client_streaming else "unary") + "_"
    kind += "stream" if method.server_streaming else "unary"
    make = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    argument = iter([request]) if method.client_streaming else request
    said = []
    try:
        answer = make(argument, timeout=DEADLINE_S)
        if method.server_streaming:
            for response in answer:
                said.append(response.SerializeToString())
                if method.name in ENDLESS:
                    answer.cancel()
                    break
        else:
            said.append(answer.SerializeToString())
    except grpc.RpcError as error:
        said += [str(pair).encode() for pair in _said_in(error)]
    return b"\n".join(said)


def _said_in(error: grpc.RpcError) -> Sequence[Any]:
    assert isinstance(error, grpc.Call)
    return [error.details(), *(error.trailing_metadata() or ())]


def every_text(watched: Watched, tenant: str, text: str) -> bytes:
    """Put a text into each place of each request, one at a time; all that was said to it."""
    key = watched.keyed.key(tenant)
    shown = [
        ("authorization", f"Bearer {key}"),
        ("x-note", text),
        ("tracestate", f"vendor={text}"),
        ("baggage", f"user={text}"),
        ("user-agent-note", text),
    ]
    said = []
    with contextlib.ExitStack() as stack:
        for name, method in METHODS:
            address = watched.keyed.cluster.addresses[name]
            channel = showing(
                stack.enter_context(grpc.insecure_channel(address)), lambda method: shown
            )
            for way in places(method.input_type):
                request = GetMessageClass(method.input_type)()
                put(request, way, text)
                said.append(made(channel, method, request))
    return b"\n".join(said)


def used(watched: Watched, tenant: str, text: str) -> None:
    """Do all that a program does, with a text wherever one may choose one."""
    stubs = watched.keyed.stubs(tenant)
    lora = pb.LoraConfig(rank=2, seed=1)
    create = pb.CreateModelRequest(
        lora_config=lora,
        model_id=f"{text}-model",
        request_id=f"{text}-request",
        user_metadata={text: text},
    )
    model_id = stubs.training.CreateModel(create).model.model_id
    forward_backward(stubs, call(model_id, 1))
    stubs.training.OptimStep(pb.OptimStepRequest(model_id=model_id, seq_id=2))
    paths = []
    for seq_id, kind in ((3, 1), (4, 2)):
        save = pb.SaveCheckpointRequest(
            model_id=model_id, seq_id=seq_id, kind=kind, name=f"{text}-save", lease_id=text
        )
        save.user_metadata[text] = text
        paths.append(stubs.training.SaveCheckpoint(save).checkpoint_path)
    wrong = [
        pb.LoadCheckpointRequest(model_id=model_id, seq_id=5, checkpoint_path=paths[1]),
        pb.SaveCheckpointRequest(model_id=model_id, seq_id=6, kind=1, name=f"{text}-save"),
    ]
    for request, make in zip(
        wrong, (stubs.training.LoadCheckpoint, stubs.training.SaveCheckpoint), strict=True
    ):
        with pytest.raises(grpc.RpcError):
            make(request)
    data = [datum(**{text: np.ones(5, np.float32)})]
    with pytest.raises(grpc.RpcError):
        forward_backward(stubs, call(model_id, 7, data=data))
    for path in (*paths, f"tinsmith://{text}/sampler_weights/{text}"):
        with contextlib.suppress(grpc.RpcError):
            prompt = pb.ModelInput(chunks=datum().model_input.chunks)
            stop = pb.StopCondition(strings=[text])
            params = pb.SamplingParams(max_tokens=2, seed=1, stop=stop)
            asked = pb.SampleRequest(checkpoint_path=path, prompt=prompt, sampling_params=params)
            list(stubs.sampler.Sample(asked))
    stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


def over_http(watched: Watched, key: str, text: str) -> bytes:
    """The same at the gateway; all that was said to it."""
    assert watched.keyed.cluster.gateway_url is not None
    base = watched.keyed.cluster.base_model
    path = f"tinsmith://{text}/sampler_weights/{text}"
    messages = [{"role": "user", "content": text}, {"role": text, "content": text}]
    chat = "/v1/chat/completions"
    requests: Sequence[tuple[str, str, Any]] = [
        ("POST", "/v1/completions", {"model": base, "prompt": text, "max_tokens": 2}),
        ("POST", "/v1/completions", {"model": base, "prompt": text, "user": text, text: text}),
        ("POST", "/v1/completions", {"model": text, "prompt": text}),
        ("POST", "/v1/completions", {"model": path, "prompt": text}),
        ("POST", "/v1/completions", {"model": base, "prompt": text, "stop": [text], "n": text}),
        (
            "POST",
            chat,
            {"model": base, "messages": messages[:1], "max_tokens": 2},
        ),
        ("POST", chat, {"model": base, "messages": messages}),
        ("POST", chat, f'{{"{text}": {text}'),
        ("GET", f"/v1/models/{text}", None),
        ("GET", f"/{text}?{text}={text}", None),
        ("POST", "/api/v1/create_session", {"tags": [text], "user_metadata": {text: text}}),
        ("POST", "/api/v1/create_model", {"session_id": text, "base_model": text, text: text}),
        ("POST", "/api/v1/asample", {"sampling_session_id": text, "prompt": {text: text}}),
        ("POST", "/api/v1/retrieve_future", {"request_id": text}),
        ("POST", "/api/v1/save_weights", {"model_id": text, "path": text}),
        ("POST", "/api/v1/forward_backward", {"model_id": text, "forward_backward_input": text}),
        ("GET", f"/api/v1/training_runs/{text}", None),
        ("GET", f"/api/v1/training_runs/{text}/checkpoints/weights/{text}/archive", None),
        ("DELETE", f"/api/v1/training_runs/{text}/checkpoints/{text}", None),
    ]
    headers = {
        "X-API-Key": key,
        "Content-Type": "application/json",
        "User-Agent": text,
        "X-Note": text,
        "Cookie": f"{text}={text}",
        "tracestate": f"a={text}",
        "baggage": f"a={text}",
    }
    said = []
    for method, where, body in requests:
        connection = http.client.HTTPConnection(
            watched.keyed.cluster.gateway_url.removeprefix("http://"), timeout=60
        )
        data = body if isinstance(body, str) or body is None else json.dumps(body)
        connection.request(method, where, data, headers)
        response = connection.getresponse()
        said += [str(response.headers).encode(), response.read()]
        connection.close()
    return b"\n".join(said)


def with_the_client(watched: Watched, text: str) -> None:
    """What the client itself finds out, and what it says of keys."""
    address = watched.keyed.cluster.address
    key = watched.keyed.key("alice")
    with tinsmith.ServiceClient({text: text}, base_url=address, api_key=key) as service:
        with pytest.raises(tinsmith.NotFoundError):
            service.create_lora_training_client(text, rank=2).result()
        base = watched.keyed.cluster.base_model
        trainer = service.create_lora_training_client(base, rank=2, seed=1).result()
        inputs = {"target_tokens": np.array([1]), "weights": np.ones(1, np.float32)}
        data = [types.Datum(types.ModelInput.from_ints([1]), inputs)]
        with pytest.raises(tinsmith.InvalidArgumentError):
            trainer.forward_backward(data, "ppo", {text: 1.0}).result()
    for wrong in (f"tml-{text}", text):
        with (
            pytest.raises(tinsmith.AuthenticationError),
            tinsmith.ServiceClient(base_url=address, api_key=wrong) as service,
        ):
            service.get_server_capabilities()


def pids(watched: Watched) -> Iterator[int]:
    """All processes of the cluster."""
    cluster = watched.keyed.cluster
    for name in cluster.addresses:
        yield cluster.pid(name)
    for pid in cluster.rank_pids():
        yield pid
        yield from children(pid)


def said_of_itself(watched: Watched) -> Iterator[tuple[str, bytes]]:
    """Everything that the cluster said to whoever runs it."""
    for log in sorted(watched.keyed.cluster.logs.iterdir()):
        yield log.name, log.read_bytes()
    for name, body in watched.metrics().items():
        yield f"metrics of {name}", body
    yield "spans", b"\n".join(watched.collector.bodies)


def test_what_a_tenant_wrote_is_nobody_elses(watched: Watched) -> None:
    alices = every_text(watched, "alice", CANARY)
    assert LOWER in alices, "it was not even said to its own tenant"
    used(watched, "alice", CANARY)
    over_http(watched, watched.keyed.key("alice"), CANARY)
    over_http(watched, f"tml-{CANARY}", CANARY)
    with_the_client(watched, CANARY)
    bobs = every_text(watched, "bob", "other") + over_http(watched, watched.keyed.key("bob"), "x")
    assert LOWER not in bobs
    before = len(watched.collector.spans)
    watched.keyed.stubs("bob").training.ListModels(pb.ListModelsRequest())
    watched.collector.until(lambda spans: len(spans) > before)

    for where, said in said_of_itself(watched):
        assert said, where
        at = said.lower().find(LOWER)
        assert at < 0, (where, said[max(at - 300, 0) : at + 100])
    assert {event["level"] for event in watched.events("training")} >= {"DEBUG", "INFO"}
    assert b" DEBUG " in (watched.keyed.cluster.logs / "sampler.log").read_bytes()
    assert set(JSON) == {"training", "trainer", "gateway"}


def test_keys_are_in_no_command_line_no_environment_and_nothing_that_was_said(
    watched: Watched,
) -> None:
    keys = [made.text.removeprefix("tml-").encode() for made in watched.keyed.made.values()]
    data = watched.keyed.cluster.logs.parent
    keys += [file.read_text().strip().removeprefix("tml-").encode() for file in _keys(data)]
    assert len(keys) > len(watched.keyed.made)
    for pid in pids(watched):
        for what in ("cmdline", "environ"):
            said = Path(f"/proc/{pid}/{what}").read_bytes()
            assert said, (pid, what)
            assert not [key for key in keys if key in said], (pid, what)
    for where, said in said_of_itself(watched):
        assert not [key for key in keys if key in said], where


def _keys(data: Path) -> list[Path]:
    """Files with the keys that the cluster made for itself."""
    return [file for file in data.rglob("*.key") if "tls" not in file.parts]
