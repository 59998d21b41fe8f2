"""The gateway over plain HTTP, in front of a real cluster."""

import json
import zlib

import zstandard

from gateways import RunningGateway, ask


def test_it_is_ready_once_its_cluster_is(gateway: RunningGateway) -> None:
    """A probe asks what a call would need."""
    assert ask(gateway, "/healthz") == (200, {"status": "ok"})


def test_a_session_is_made_beaten_and_finished(gateway: RunningGateway) -> None:
    """By its id alone: a heartbeat may go to any gateway."""
    status, flags = ask(gateway, "/api/v1/client/config", {"sdk_version": "0.38.0"})
    assert status == 200
    assert flags["proto_compress_fwdbwd"] is False  # on this machine
    forwarded = {"X-Forwarded-For": "192.0.2.7"}
    _, flags = ask(gateway, "/api/v1/client/config", {}, headers=forwarded)
    assert flags["proto_compress_fwdbwd"] is True
    asked = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    status, session = ask(gateway, "/api/v1/create_session", asked)
    assert status == 200
    beat = {"session_id": session["session_id"], "type": "session_heartbeat"}
    assert ask(gateway, "/api/v1/session_heartbeat", beat)[0] == 200
    path = f"/api/v1/sessions/{session['session_id']}/finish"
    assert ask(gateway, path, {"reason": {"type": "success"}, "detail": None})[0] == 200
    assert ask(gateway, "/api/v1/session_heartbeat", {"session_id": "absent"})[0] == 404


def test_what_is_wrong_with_a_body_is_said_in_a_body(gateway: RunningGateway) -> None:
    """An SDK takes a 400 without a body for a broken connection."""
    path = "/api/v1/session_heartbeat"
    for body, status in [
        (b"{", 400),
        (b"[1]", 400),
        (b'{"session_id": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"session_id": NaN}', 400),
        (b'{"session_id": 7}', 400),
        (b"{}", 400),
    ]:
        found, said = ask(gateway, path, body)
        assert (found, bool(said["detail"])) == (status, True), body[:20]
    for encoding, body, status in [
        ("br", b"{}", 415),
        ("gzip", b"{}", 400),
        ("zstd", b"{}", 400),
        ("gzip", zlib.compress(bytes(80 << 20), wbits=31), 413),
        ("zstd", zstandard.compress(bytes(80 << 20)), 413),
    ]:
        found, said = ask(gateway, path, body, headers={"Content-Encoding": encoding})
        assert (found, bool(said["detail"])) == (status, True), encoding
    assert ask(gateway, "/api/v1/absent", {})[0] == 404
    assert ask(gateway, path)[0] == 405


def test_a_packed_body_is_unpacked(gateway: RunningGateway) -> None:
    """gzip and zstd."""
    _, session = ask(gateway, "/api/v1/create_session", {})
    text = json.dumps({"session_id": session["session_id"]}).encode()
    for encoding, body in [
        ("gzip", zlib.compress(text, wbits=31)),
        ("zstd", zstandard.compress(text)),
    ]:
        headers = {"Content-Encoding": encoding}
        assert ask(gateway, "/api/v1/session_heartbeat", body, headers=headers)[0] == 200


def test_an_unknown_promise_is_not_found(gateway: RunningGateway) -> None:
    """At once, whatever its text is."""
    for request_id in ("absent", "step-", "step-%%%", "step-eJw", "nothing-eJyrrgUAAXUA-Q"):
        assert ask(gateway, "/api/v1/retrieve_future", {"request_id": request_id})[0] == 404
