"""What hostile callers send to a gateway: bodies, headers, encodings, bombs, half requests.

Every request has an answer or its connection is closed, soon; no answer is 500; memory stays
bounded; and a well-behaved caller is served all the while.
"""

import copy
import functools
import http.client
import json
import random
import select
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zstandard

from attack.amount import SEED, amount
from attack.harness import Memory
from attack.mutate import change_fields, flip_bytes
from attack.test_streams import OTHER_HOST
from clusters import RunningCluster
from gateways import RunningGateway, ask, running_gateway
from sdk_calls import PATH, Sdk, call
from tinsmith.gateway.v1 import tinker_pb2 as tinker
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.promises import promise_id, read_promise

STALL_S = 1.0
ANSWER_S_MAX = 20.0
GROWN_BYTES_MAX = 400 * 1024 * 1024
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1 << 63,
        1 << 200,
        0.5,
        1e308,
        "",
        "x",
        "\0",
        "é" * 3000,
        "tinker://a/b/c",
    ),
    *([], {}, [[]], {"a": {}}, ["x"] * 1000, {"type": "dimuon"}, [1, 2, 3]),
)


@pytest.fixture(scope="module")
def victim(attacked: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway that does not wait for long."""
    settings = {"body_stall_s": STALL_S, "poll_s_max": 0.2, "request_s_max": 2.0}
    folder = tmp_path_factory.mktemp("victim")
    with running_gateway(attacked.address, folder, **settings) as gateway:
        yield gateway


def requests_of(sdk: Sdk, model_id: str) -> list[tuple[str, str, Any]]:
    """Method, path and body of one good request of each kind."""
    session, other = sdk.session_id, "s-" + "0" * 32
    base = {"model_id": model_id, "seq_id": 1}
    create = {"session_id": other, "model_seq_id": 0, "base_model": "tiny-llama"}
    chunks = [{"type": "encoded_text", "tokens": [5, 6]}]
    datum = {"target_tokens": {"data": [6, 7], "dtype": "int64", "shape": [2]}}
    data = [{"model_input": {"chunks": chunks}, "loss_fn_inputs": datum}]
    sampled = {
        "sampling_session_id": f"{session}:sample:0:dGlueS1sbGFtYQ",
        "seq_id": 0,
        "num_samples": 1,
        "prompt": {"chunks": chunks},
        "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
    }
    promise = sdk.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    posts: list[tuple[str, Any]] = [
        ("client/config", {"sdk_version": "0.38.0"}),
        ("create_session", {"tags": [], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0"}),
        ("session_heartbeat", {"session_id": session}),
        (f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None}),
        ("telemetry", {"events": []}),
        ("create_model", {**create, "lora_config": {"rank": 0, "seed": 1}}),
        ("get_info", {"model_id": model_id}),
        ("forward_backward", call(model_id, 1)),
        ("forward", {**base, "forward_input": {"data": data, "loss_fn": "cross_entropy"}}),
        ("optim_step", {**base, "adam_params": {"learning_rate": 0.1, "beta1": 0.9}}),
        ("save_weights", {**base, "path": "a/b", "ttl_seconds": 3600, "overwrite": False}),
        ("load_weights", {**base, "path": "tinker://a/weights/b", "optimizer": True}),
        ("save_weights_for_sampler", {**base, "path": "a/b", "kind": "snapshot"}),
        ("retrieve_future", {"request_id": promise["request_id"], "allow_metadata_only": True}),
        ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0}),
        ("asample", sampled),
        ("weights_info", {"tinker_path": "tinker://a/weights/b"}),
    ]
    gets = ["training_runs?limit=2", "checkpoints?offset=1", f"training_runs/{model_id}"]
    gets += [f"samplers/{session}:sample:0:dGlueS1sbGFtYQ", f"sessions/{session}", "healthz"]
    return [("POST", path, body) for path, body in posts] + [("GET", path, None) for path in gets]


def changed(body: Any, rng: random.Random) -> Any:
    """A JSON body with something else in one to three places."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(body))
        if not places:
            return rng.choice(VALUES)
        where, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                where[key] = copy.deepcopy(rng.choice(VALUES))
            case 1 if isinstance(where, dict):
                del where[key]
            case 2 if isinstance(where, dict):
                where[rng.choice(["x", "", "model_id", "type"])] = copy.deepcopy(rng.choice(VALUES))
            case _:
                where[key] = [where[key]]
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(items):
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)


def damaged(path: str, body: Any, rng: random.Random) -> tuple[str, bytes]:
    """Path and bytes of a request that somebody changed."""
    if rng.random() < 0.15:
        path = flip_bytes(path.encode(), rng).decode("latin-1").replace(" ", "%20")
        path = "".join(each for each in path if each.isprintable() and each.isascii())
    if isinstance(body, bytes):
        if rng.random() < 0.5:
            message = tinker.ForwardBackwardRequest.FromString(body)
            return path, change_fields(message, rng)
        return path, flip_bytes(body, rng)
    if body is None:
        return path, b""
    data = json.dumps(changed(body, rng)).encode()
    return path, flip_bytes(data, rng) if rng.random() < 0.3 else data


def headers_of(body: bytes, rng: random.Random) -> tuple[dict[str, str], bytes]:
    """Headers of a request, some of them wrong, and its body under them."""
    headers = {"Host": "x", "Content-Length": str(len(body)), "Content-Type": "application/json"}
    match rng.randrange(12):
        case 0:
            bomb = rng.choice(_bombs())
            encoding = "gzip" if bomb[:2] == b"\x1f\x8b" else "zstd"
            return headers | {"Content-Encoding": encoding, "Content-Length": str(len(bomb))}, bomb
        case 1:
            packed = zstandard.compress(body)
            packed = flip_bytes(packed, rng) if rng.random() < 0.5 else packed
            length = str(len(packed))
            return headers | {"Content-Encoding": "zstd", "Content-Length": length}, packed
        case 2:
            headers["Content-Encoding"] = rng.choice(
                ["gzip", "zstd", "br", "", "x" * 900, "gzip, br"]
            )
        case 3:
            headers["Content-Length"] = rng.choice(["-1", "x", "9" * 30, "99999999", "0", "1"])
        case 4:
            headers["Content-Type"] = rng.choice(["", "application/x-protobuf", "x" * 2000, "é"])
        case 5:
            headers["Accept"] = rng.choice(["", "application/x-protobuf", "*/*", "\t"])
        case 6:
            headers = {"Host": "x", "Transfer-Encoding": rng.choice(["chunked", "x", "chunked, x"])}
        case 7:
            headers["X-Long"] = "x" * rng.choice([10, 70_000, 400_000])
        case _:
            pass
    return headers, body


@functools.cache
def _bombs() -> list[bytes]:
    return [zlib.compress(bytes(100 << 20), 1, 31), zstandard.compress(bytes(100 << 20))]


def sent(
    gateway: RunningGateway, method: str, path: str, headers: dict[str, str], body: bytes
) -> int:
    """Send bytes; returns the status of what comes back, 0 where the connection is closed."""
    head = f"{method} /api/v1/{path} HTTP/1.1\r\n"
    head += "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=ANSWER_S_MAX) as connection:
        try:
            connection.sendall(head.encode("latin-1") + b"\r\n" + body)
            answer = connection.recv(4096)
        except (ConnectionError, BrokenPipeError):
            return 0
    return int(answer.split(b" ", 2)[1]) if answer else 0


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_no_request_ends_it_or_fills_it(victim: RunningGateway) -> None:
    """Mutated requests of every kind, with good and bad headers."""
    rng = random.Random(SEED)
    sdk = Sdk(victim, patient=True)  # this gateway gives up early, for who behaves well, too
    model_id = sdk.model()
    good = requests_of(sdk, model_id)
    before = rss_bytes(victim.pid)
    seen: dict[int, int] = {}
    slowest_s = 0.0
    for _ in range(amount(300)):
        method, path, body = rng.choice(good)
        path, data = damaged(path, body, rng)
        headers, data = headers_of(data, rng)
        begun_s = time.monotonic()
        status = sent(victim, method, path, headers, data)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        seen[status] = seen.get(status, 0) + 1
        assert status != 500, (method, path, headers, data[:300], victim.log.read_text()[-2000:])
    print(f"statuses {seen}, slowest {slowest_s:.2f} s, grown {rss_bytes(victim.pid) - before:,}")
    assert rss_bytes(victim.pid) - before < GROWN_BYTES_MAX
    assert Sdk(victim, patient=True).asked_get("healthz") == {"status": "ok"}


def test_a_promise_that_somebody_made_up_is_no_fault(victim: RunningGateway) -> None:
    """Its content is what a caller says, and may be anything."""
    rng = random.Random(SEED)
    sdk = Sdk(victim, patient=True)  # this gateway gives up early, for who behaves well, too
    model_id = sdk.model()
    base = {"model_id": model_id, "seq_id": 1}
    sampled = next(body for _, path, body in requests_of(sdk, model_id) if path == "asample")
    promises = [
        sdk.post("optim_step", {**base, "adam_params": {"learning_rate": 0.1}}),
        sdk.post("save_weights", {**base, "seq_id": 2, "path": "a"}),
        sdk.post("save_weights_for_sampler", {**base, "seq_id": 3, "path": "b"}),
        sdk.post("load_weights", {**base, "seq_id": 4, "path": f"tinker://{model_id}/weights/a"}),
        sdk.post("forward_backward", call(model_id, 5)),
        sdk.post("asample", sampled),
        sdk.post(
            "create_model",
            {"session_id": sdk.session_id, "model_seq_id": 1}
            | {"base_model": "tiny-llama", "lora_config": {"rank": 2}},
        ),
    ]
    for _ in range(amount(100)):
        kind, content = read_promise(rng.choice(promises)["request_id"])
        try:
            name = promise_id(kind, changed(content, rng))
        except Problem:  # it became too large
            continue
        status, said = ask(victim, f"{PATH}/retrieve_future", {"request_id": name})
        assert status in (200, 400, 404, 408, 410, 429, 503), (status, said)
        assert "fault of the gateway" not in str(said), (kind, content, said)
    assert "Traceback" not in victim.log.read_text()


MUCH = {
    "session_heartbeat": b"[],",
    "optim_step": b"{},",
    "asample": b"1.5,",
    "forward": b'"ab",',
}
"""By path, what a list has millions of."""


@pytest.mark.parametrize("path", list(MUCH))
def test_a_body_is_counted_before_it_is_read(victim: RunningGateway, path: str) -> None:
    """A few kilobytes that unpack to millions of values would hold a gigabyte, and everybody up."""
    each = MUCH[path]
    text = b'{"session_id": [' + each * (60_000_000 // len(each)) + b"0]}"
    body = zlib.compress(text, 1, 31)
    grown = Memory(victim.pid)
    head = {"Host": "x", "Content-Encoding": "gzip", "Content-Type": "application/json"}
    head["Content-Length"] = str(len(body))
    assert sent(victim, "POST", path, head, body) == 400
    assert grown.growth_bytes < GROWN_BYTES_MAX
    assert Sdk(victim, patient=True).asked_get("healthz") == {"status": "ok"}


SLOW: dict[str, Callable[[], bytes]] = {
    "half a head": lambda: b"POST /api/v1/telemetry HTTP/1.1\r\nHost: x\r\n",
    "half a body": lambda: (
        b"POST /api/v1/telemetry HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    ),
    "half a chunk": lambda: (
        b"POST /api/v1/telemetry HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{"
    ),
    "nothing": lambda: b"",
}


def test_half_requests_are_ended(victim: RunningGateway) -> None:
    """Whoever stops within a request is answered 408, or cut off; others are served meanwhile."""
    host, _, port = victim.url.removeprefix("http://").rpartition(":")
    connections = []
    for number in range(amount(40, most=2000)):
        connection = socket.create_connection((host, int(port)), timeout=ANSWER_S_MAX)
        connection.sendall(list(SLOW.values())[number % len(SLOW)]())
        connections.append(connection)
    assert Sdk(victim, patient=True).asked_get("healthz") == {"status": "ok"}
    for number, connection in enumerate(connections):
        try:
            answer = connection.recv(4096)
        except ConnectionError:
            answer = b""
        connection.close()
        kind = list(SLOW)[number % len(SLOW)]
        assert b" 408 " in answer if kind in ("half a body", "half a chunk") else not answer, kind


def test_a_body_that_trickles_is_ended(victim: RunningGateway) -> None:
    """A byte now and then does not hold a place for good."""
    host, _, port = victim.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=ANSWER_S_MAX) as connection:
        head = b"POST /api/v1/telemetry HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
        connection.sendall(head)
        until_s = time.monotonic() + ANSWER_S_MAX
        while not select.select([connection], [], [], STALL_S / 4)[0]:
            assert time.monotonic() < until_s, "it is still waited for"
            connection.sendall(b"x")
        assert b" 408 " in connection.recv(4096)


def test_one_host_has_a_share_of_the_places(cluster: RunningCluster, tmp_path: Path) -> None:
    """However many requests of its own wait, those of another host pass."""
    limits = {"requests_max": 4, "poll_s_max": 30}
    # Not `attacked`, where a number waits for the one before it for two seconds only.
    with running_gateway(cluster.address, tmp_path, **limits) as gateway, ExitStack() as stack:
        sdk = Sdk(gateway)
        step = {"model_id": sdk.model(), "seq_id": 2, "adam_params": {}}  # 1 does not come
        poll = json.dumps({"request_id": sdk.post("optim_step", step)["request_id"]})
        address = gateway.url.removeprefix("http://")
        for _ in range(2):
            waiting = http.client.HTTPConnection(address, timeout=ANSWER_S_MAX)
            stack.callback(waiting.close)
            waiting.request("POST", "/api/v1/retrieve_future", poll)
        until_s = time.monotonic() + ANSWER_S_MAX
        while sdk.asked("client/config", {})[0] == 200:  # until both have come
            assert time.monotonic() < until_s
        status, said = sdk.asked("client/config", {})
        assert (status, said["reason"]) == (429, "SERVER_BUSY"), said
        other = http.client.HTTPConnection(
            address, timeout=ANSWER_S_MAX, source_address=(OTHER_HOST, 0)
        )
        stack.callback(other.close)
        other.request("POST", "/api/v1/client/config", "{}")
        assert other.getresponse().status == 200
