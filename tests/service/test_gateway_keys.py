"""The gateway of a cluster with keys: every route wants one, and passes it on to the servers."""

import asyncio
import http.client
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from starlette.routing import Mount, Route

from keyed import Keyed, Owned
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.metrics import HttpMetrics
from tinsmithd.gateway.server import build_app

SESSION = "s-" + "a" * 32
OTHER_SESSION = "s-" + "b" * 32
OPEN = ("/healthz", "/livez")
SIGNED = "/api/v1/files/"


def routes() -> Sequence[tuple[str, str]]:
    """Method and path of every route of the production application."""

    async def build() -> list[tuple[str, str]]:
        cluster = Cluster("127.0.0.1:1", 1.0)
        app = build_app(cluster, GatewaySettings(), HttpMetrics(), asyncio.Event())
        found = list(_flat(app.routes, ""))
        await cluster.close()
        return found

    return asyncio.run(build())


def _flat(some: Sequence[Any], before: str) -> Iterator[tuple[str, str]]:
    for route in some:
        if isinstance(route, Mount):
            yield from _flat(route.routes, before + route.path)
        elif isinstance(route, Route):
            methods = route.methods or {"POST"}
            for method in sorted(methods - {"HEAD"}):
                yield method, before + route.path


ROUTES = routes()
BY_ID = [(method, path) for method, path in ROUTES if path not in OPEN]


def ask(
    keyed: Keyed, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[Any, ...]:
    """Status, headers and body of one request."""
    assert keyed.cluster.gateway_url is not None
    where = keyed.cluster.gateway_url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=60)
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    found = response.status, dict(response.headers), response.read()
    connection.close()
    return found


def filled(path: str, model_id: str, session_id: str) -> str:
    """A route's path with ids of somebody in it."""
    values = {
        **dict.fromkeys(("run", "training_run_id", "model_id"), model_id),
        "session_id": session_id,
        "kind": "weights",
        "name": "one",
    }
    return re.sub(r"\{(\w+)(:\w+)?\}", lambda match: values.get(match[1], "one"), path)


def body_of(model_id: str, session_id: str) -> dict[str, Any]:
    """A body that names all that somebody has; each route reads its own part."""
    path = f"tinker://{model_id}/weights/one"
    return {
        "model_id": model_id,
        "session_id": session_id,
        "model_seq_id": 1,
        "seq_id": 1,
        "path": path,
        "model_path": path.replace("weights", "sampler_weights"),
        "model": path.replace("weights", "sampler_weights"),
        "tinker_path": path,
        "prompt": [1, 2],
        "ttl_seconds": 100,
        "adam_params": {"learning_rate": 0.1},
        "sampling_session_id": f"{session_id}:sample:1:eA",
        "request_id": "x-y",
    }


@pytest.fixture(scope="module")
def model_of_a_session(keyed: Keyed) -> Owned:
    """A model of Alice's under an id that an SDK would give it."""
    return keyed.own("alice", f"{SESSION}:train:0")


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[" ".join(route) for route in ROUTES])
def test_without_a_good_key_no_route_answers(keyed: Keyed, method: str, path: str) -> None:
    """But the probes, and signed URLs, whose signature is their key."""
    path = filled(path, "m", SESSION)
    tries: list[dict[str, str]] = [
        {},
        {"x-api-key": "tml-" + secrets.token_urlsafe(32)},
        {"x-api-key": keyed.key("revoked")},
        {"authorization": f"Basic {keyed.key('alice')}"},
        {"x-api-key": "tml-wrong", "authorization": f"Bearer {keyed.key('alice')}"},
    ]
    for headers in tries:
        status, given, said = ask(keyed, method, path, {} if method == "POST" else None, headers)
        if path in OPEN:
            assert status == 200
        elif path.startswith(SIGNED):
            assert status == 403
        else:
            assert status == 401
            assert given["www-authenticate"] == "Bearer"
            assert b"key" in said
            assert (b'"error":{' in said) == path.startswith(("/v1", "/oai/api/v1"))


@pytest.mark.parametrize(("method", "path"), BY_ID, ids=[" ".join(route) for route in BY_ID])
def test_what_is_foreign_and_what_is_absent_look_the_same(
    keyed: Keyed, model_of_a_session: Owned, method: str, path: str
) -> None:
    """In status and body; what is promised is waited for, too."""
    headers = {"x-api-key": keyed.key("bob")}
    seen = []
    for session_id in (SESSION, OTHER_SESSION):
        model_id = f"{session_id}:train:0"
        body = body_of(model_id, session_id) if method != "GET" else None
        status, _, said = ask(keyed, method, filled(path, model_id, session_id), body, headers)
        seen.append((status, _without_ids(said, session_id)))
        promise = _promise(said)
        if promise:
            answer = {"request_id": promise}
            status, _, said = ask(keyed, "POST", "/api/v1/retrieve_future", answer, headers)
            seen.append((status, _without_ids(said, session_id)))
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def _promise(said: bytes) -> str:
    try:
        found = json.loads(said)
    except ValueError:
        return ""
    return str(found.get("request_id", "")) if isinstance(found, dict) else ""


def _without_ids(said: bytes, session_id: str) -> bytes:
    text = said.replace(session_id.encode(), b"SESSION")
    text = re.sub(rb'"(request_id|id|session_id|sampling_session_id)": ?"[^"]*"', b'"id"', text)
    return re.sub(rb'"(created|client_counter)": ?\d+|\d{4}-\d\d-\d\dT[0-9:.]+', b"", text)


def test_an_owner_sees_its_own_through_the_gateway(keyed: Keyed, model_of_a_session: Owned) -> None:
    """With either header; its runs, and nobody else's."""
    for headers in (
        {"x-api-key": keyed.key("alice")},
        {"authorization": f"Bearer {keyed.key('alice')}"},
    ):
        status, _, said = ask(
            keyed, "POST", "/api/v1/get_info", {"model_id": model_of_a_session.model_id}, headers
        )
        assert status == 200, said
    status, _, said = ask(
        keyed, "GET", "/api/v1/training_runs?limit=100", None, {"x-api-key": keyed.key("bob")}
    )
    assert status == 200
    assert SESSION.encode() not in said


def test_a_promise_of_one_caller_is_no_result_for_another(
    keyed: Keyed, model_of_a_session: Owned
) -> None:
    """Though the gateway has the answer in its memory."""
    body = {"model_id": model_of_a_session.model_id, "path": "kept", "seq_id": 5}
    mine, theirs = {"x-api-key": keyed.key("alice")}, {"x-api-key": keyed.key("bob")}
    status, _, said = ask(keyed, "POST", "/api/v1/save_weights", body, mine)
    assert status == 200, said
    asked = {"request_id": json.loads(said)["request_id"]}
    status, _, said = ask(keyed, "POST", "/api/v1/retrieve_future", asked, mine)
    assert b"/weights/kept" in said
    _, _, other = ask(keyed, "POST", "/api/v1/retrieve_future", asked, theirs)
    assert b"no model" in other
    _, _, again = ask(keyed, "POST", "/api/v1/retrieve_future", asked, mine)
    assert again == said


def test_a_signed_url_needs_no_key_and_is_for_one_owner(
    keyed: Keyed, model_of_a_session: Owned
) -> None:
    """Nobody can make it one for somebody else's files."""
    path = f"/api/v1/training_runs/{model_of_a_session.model_id}/checkpoints/weights/one/archive"
    status, given, said = ask(keyed, "GET", path, None, {"x-api-key": keyed.key("alice")})
    assert status == 302, said
    url = given["location"]
    assert "owner=alice" in url
    local = url.partition("/api/v1/")[2]
    status, _, archive = ask(keyed, "GET", f"/api/v1/{local}", None, {})
    assert status == 200
    assert len(archive) > 1000
    for changed in (local.replace("owner=alice", "owner=bob"), local.replace("&owner=alice", "")):
        assert ask(keyed, "GET", f"/api/v1/{changed}", None, {})[0] == 403


def test_a_request_with_two_keys_is_refused(keyed: Keyed) -> None:
    """What stands before the gateway may have looked at the other one; one shown twice is one."""
    assert keyed.cluster.gateway_url is not None
    where = keyed.cluster.gateway_url.removeprefix("http://")
    for keys, status in ((("alice", "bob"), 401), (("alice", "alice"), 200)):
        connection = http.client.HTTPConnection(where, timeout=60)
        connection.putrequest("GET", "/api/v1/training_runs")
        for name in keys:
            connection.putheader("X-API-Key", keyed.key(name))
        connection.endheaders()
        response = connection.getresponse()
        said = response.read()
        connection.close()
        assert response.status == status
        assert (b"more than one key" in said) == (status == 401)
