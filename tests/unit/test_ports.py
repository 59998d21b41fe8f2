"""Ports that tests take before somebody listens on them."""

import socket

import pytest

import ports


def test_ports_that_are_taken_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody listens on them yet; a process that ends gives its own back."""
    first = ports.take(3)
    monkeypatch.setattr(ports, "_FIRST", range(first, first + 1))
    with pytest.raises(RuntimeError, match="no free ports"):
        ports.take()
    for port in range(first, first + 3):
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
    ports._claims.pop().close()
    assert ports.take(3) == first


def test_a_port_that_somebody_listens_on_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither are its neighbours."""
    first = ports.take(3)
    ports._claims.pop().close()
    monkeypatch.setattr(ports, "_FIRST", range(first, first + 1))
    with socket.socket() as server:
        server.bind(("127.0.0.1", first + 2))
        with pytest.raises(RuntimeError, match="no free ports"):
            ports.take(3)
    assert ports.take(3) == first
