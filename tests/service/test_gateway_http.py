"""HTTP itself at the gateway, byte by byte: other protocols, odd bodies, pages in browsers."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters import RunningCluster
from gateways import RunningGateway, ask, running_gateway

WAIT_S = 30
BEAT = "/api/v1/create_session"
MODELS = "/v1/models"
CHAT = "/v1/chat/completions"
PAGE = "https://page.example"


def sent(gateway: RunningGateway, data: bytes) -> bytes:
    """All that is answered to some bytes, until the gateway closes."""
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(data)
        pieces = []
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def statuses(answers: bytes) -> list[int]:
    """The status of each answer."""
    heads = answers.split(b"HTTP/1.1 ")[1:]
    return [int(head[:3]) for head in heads]


def post(body: bytes, *headers: str, path: str = BEAT, length: bool = True) -> bytes:
    """One request."""
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


END = post(b"{}", "Connection: close")
"""A request after which the connection is closed."""


@pytest.mark.parametrize("parts", ["whole", "bytes"])
@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0"])
def test_a_request_for_another_protocol_is_answered_as_if_it_were_none(
    gateway: RunningGateway, upgrade: str, parts: str
) -> None:
    """With its body, as Java's client sends one; what follows on the connection is the next."""
    body = json.dumps({"user_metadata": {"a": 1}}).encode()
    asked = post(body, "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}")
    host, _, port = gateway.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        if parts == "whole":
            connection.sendall(asked + END)
        else:  # each in a packet of its own
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in asked:
                connection.sendall(bytes([byte]))
            connection.sendall(END)
        answers = b""
        while piece := connection.recv(1 << 16):
            answers += piece
    assert statuses(answers) == [400, 200]
    assert b"user_metadata" in answers  # the body was read


def test_a_body_is_never_taken_for_a_request(gateway: RunningGateway) -> None:
    """What stands before the gateway saw one request where there would be two."""
    inner = post(b"{}", path="/api/v1/telemetry")
    for headers in (["Connection: Upgrade", "Upgrade: h2c"], []):
        answers = sent(gateway, post(inner, *headers) + END)
        assert statuses(answers) == [400, 200]
    chunked = ["Connection: Upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked"]
    assert statuses(sent(gateway, post(b"0\r\n\r\n", *chunked, length=False) + END)) == [400]


@pytest.mark.parametrize(
    "headers",
    [
        ["Transfer-Encoding: chunked", "Content-Length: 2"],
        ["Content-Length: 2", "Content-Length: 5"],
        ["Content-Length: -2"],
        ["Content-Length: +2"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding : chunked"],
        [" folded: value"],
        ["name\x00: value"],
    ],
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(
    gateway: RunningGateway, headers: list[str]
) -> None:
    """And nothing that follows it is answered."""
    assert statuses(sent(gateway, post(b"{}", *headers, length=False) + END)) == [400]


def test_bodies_come_in_all_forms_that_http_has(gateway: RunningGateway) -> None:
    """In chunks with extensions and trailers, many requests at once, after a wait for 100."""
    chunks = b'3;a=b\r\n{  \r\n1\r\n}\r\n0\r\nX-Trailer: "x"\r\n\r\n'
    answers = sent(gateway, post(chunks, "Transfer-Encoding: chunked", length=False) + END)
    assert statuses(answers) == [200, 200]
    assert statuses(sent(gateway, post(b"{}") * 5 + END)) == [200] * 6
    answers = sent(gateway, post(b"{}", "Expect: 100-continue") + END)
    assert statuses(answers) == [100, 200, 200]
    old = b"POST /api/v1/create_session HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"
    assert statuses(sent(gateway, old)) == [200]


def test_what_is_not_http_is_refused_and_cut_off(gateway: RunningGateway) -> None:
    """Whatever it is."""
    for data in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET / HTTP/1.1 \x00\r\n\r\n",
        b"CONNECT host:443 HTTP/1.1\r\nHost: host\r\n\r\n",
        b"GET http://other/v1/models HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
    ):
        answers = sent(gateway, data)
        assert statuses(answers) in ([400], []), data


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/training_runs/%00",
        "/api/v1/training_runs/%ff%fe/checkpoints",
        "/api/v1/training_runs/..%2f..%2fetc/checkpoints",
        "/api/v1/samplers/%E2%82%AC",
        "/api/v1/sessions/%F0%9F%92%A9",
        "/api/v1//create_session",
        "/api/v1/create_session/",
        "/v1/models/%00",
        "/v1/models/" + "m" * 60_000,
        "/v1/models?" + "&".join(f"a{n}={n}" for n in range(5000)),
        "/" + "a/" * 30_000,
        "*",
    ],
)
def test_odd_paths_are_answered_with_a_short_refusal(gateway: RunningGateway, path: str) -> None:
    """Percent signs, zeros, what is no UTF-8, and very long ones."""
    lines = [f"GET {path} HTTP/1.1", "Host: gateway", "Connection: close", "", ""]
    answers = sent(gateway, "\r\n".join(lines).encode())
    assert statuses(answers)[0] in (200, 400, 404, 405)
    assert len(answers) < 4096
    assert b"location" not in answers.lower()


def test_a_wrong_method_is_refused_in_the_form_of_the_api(gateway: RunningGateway) -> None:
    """With the methods that there are; a probe by HEAD has no body."""
    for path, key in ((BEAT, "detail"), (CHAT, "error")):
        for method in ("OPTIONS", "TRACE", "PATCH"):
            status, said = ask(gateway, path, None, method=method)
            assert status == 405 or (key == "error" and status == 404)
            assert said[key]
    status, said = ask(gateway, "/v1/models", None, method="HEAD")
    assert (status, said) == (200, None)


@pytest.fixture(scope="module")
def open_gateway(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    """One that a page may call."""
    folder: Path = tmp_path_factory.mktemp("open")
    settings: dict[str, Any] = {"allowed_origins": f"http://other.example, {PAGE}"}
    with running_gateway(cluster.address, folder, **settings) as running:
        yield running


def test_a_web_page_that_nobody_named_may_not_call(
    gateway: RunningGateway, open_gateway: RunningGateway
) -> None:
    """A browser would send its simple requests, whatever it may read of the answer."""
    for running, origin in ((gateway, PAGE), (open_gateway, "https://evil.example")):
        for path, key in ((BEAT, "detail"), (CHAT, "error")):
            status, said = ask(running, path, {}, headers={"Origin": origin})
            assert status == 403
            assert "allowed_origins" in json.dumps(said[key])
    assert ask(open_gateway, BEAT, {}, headers={"Origin": "null"})[0] == 403


def test_a_page_that_is_allowed_may_and_its_browser_is_told(open_gateway: RunningGateway) -> None:
    """Before the request, and with its answer, a refusal too."""
    preflight = [
        f"OPTIONS {CHAT} HTTP/1.1",
        "Host: gateway",
        f"Origin: {PAGE}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, content-type",
        "Connection: close",
        "",
        "",
    ]
    answer = sent(open_gateway, "\r\n".join(preflight).encode())
    assert statuses(answer) == [200]
    assert f"access-control-allow-origin: {PAGE}".encode() in answer
    assert b"authorization" in answer
    for path, status in ((BEAT, 200), (CHAT, 400)):
        page = post(b"{}", f"Origin: {PAGE}", "Connection: close", path=path)
        answer = sent(open_gateway, page)
        assert statuses(answer) == [status]
        assert f"access-control-allow-origin: {PAGE}".encode() in answer


def test_a_name_that_somebody_may_own_is_not_one_of_a_gateway_without_keys(
    gateway: RunningGateway, open_gateway: RunningGateway
) -> None:
    """A page may let its own host stand for this machine, and then reads what it likes as its own:
    without an origin, by that name."""
    for path, key in (("/api/v1/training_runs", "detail"), (MODELS, "error")):
        for host in ("evil.example", "EVIL.example.:8080", "127.0.0.1.evil.example"):
            status, said = ask(gateway, path, headers={"Host": host})
            assert status == 403
            assert "allowed_hosts" in json.dumps(said[key])
        for host in ("127.0.0.1:1", "localhost", "a.localhost:2", "[::1]:3", "gateway"):
            assert ask(gateway, path, headers={"Host": host})[0] == 200
        assert ask(open_gateway, path, headers={"Host": "other.example"})[0] == 200
