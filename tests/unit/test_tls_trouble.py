"""A client that cannot speak with a server, for TLS's sake, says at once what is wrong."""

import re
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

import tinsmith
from certificates import EXPIRED, Issued
from tinsmith import channels
from tinsmith.channels import TlsFiles
from tinsmith.cluster import connect

FAR_S = 600.0
"""A client that goes on waiting runs into the limit of a test."""


class Ports:
    """One gRPC server on as many ports as there are ways to be wrong."""

    def __init__(self, folder: Path) -> None:
        self.issued = Issued(folder / "good")
        expired = Issued(folder / "expired", self.issued.authority, **EXPIRED)
        elsewhere = Issued(folder / "elsewhere", self.issued.authority, ("else.example",))
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        self.plain = self._server.add_insecure_port("127.0.0.1:0")
        self.good = self._add(self.issued)
        self.expired = self._add(expired)
        self.elsewhere = self._add(elsewhere)
        self.mutual = self._add(self.issued, self.issued.ca.read_bytes())
        self._server.start()

    def _add(self, shown: Issued, authorities: bytes | None = None) -> int:
        pair = (shown.key.read_bytes(), shown.certificate.read_bytes())
        asks = authorities is not None
        credentials = grpc.ssl_server_credentials([pair], authorities, asks)
        return int(self._server.add_secure_port("127.0.0.1:0", credentials))

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    made = Ports(tmp_path_factory.mktemp("ports"))
    yield made
    made.stop()


CASES = {
    "good": ("http://", "speaks TLS: the address is https://"),
    "plain": ("https://", "does not speak TLS: leave out https://"),
    "expired": ("https://", "the certificate of .* has expired"),
    "elsewhere": ("https://", "the certificate of .* is for another name"),
    "mutual": ("https://", "hangs up on whoever shows no certificate that it knows; shown is none"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_at_once(
    name: str, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the client and by blocking stubs, which else wait for a service to come."""
    monkeypatch.setenv("TINSMITH_CA_FILE", str(ports.issued.ca))
    scheme, message = CASES[name]
    address = f"{scheme}localhost:{getattr(ports, name)}"
    with (
        tinsmith.ServiceClient(base_url=address, give_up_after_s=FAR_S) as service,
        pytest.raises(tinsmith.InvalidArgumentError, match=message) as refused,
    ):
        service.get_server_capabilities()
    assert refused.value.field == "base_url"
    with pytest.raises(tinsmith.InvalidArgumentError, match=message):
        connect(address.removeprefix("http://"), FAR_S)


def test_who_is_trusted_is_named(ports: Ports, tmp_path: Path, monkeypatch: Any) -> None:
    """With what would change it."""
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    other = Issued(tmp_path)
    address = f"https://localhost:{ports.good}"
    for ca, trusted in ((str(other.ca), str(other.ca)), ("", "the usual authorities")):
        monkeypatch.setenv("TINSMITH_CA_FILE", ca)
        with (
            tinsmith.ServiceClient(base_url=address, give_up_after_s=FAR_S) as service,
            pytest.raises(tinsmith.InvalidArgumentError, match=re.escape(trusted)) as refused,
        ):
            service.get_server_capabilities()
        assert "CERTIFICATE_VERIFY_FAILED" in str(refused.value)
        assert "TINSMITH_CA_FILE names the file of the one that does" in str(refused.value)


@pytest.mark.parametrize("name", ["good", "mutual"])
def test_what_is_right_is_answered(
    name: str, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This server knows no Tinsmith, and says so."""
    monkeypatch.setenv("TINSMITH_CA_FILE", str(ports.issued.ca))
    monkeypatch.setenv("TINSMITH_CERTIFICATE_FILE", str(ports.issued.certificate))
    monkeypatch.setenv("TINSMITH_KEY_FILE", str(ports.issued.key))
    address = f"https://127.0.0.1:{getattr(ports, name)}"
    with (
        tinsmith.ServiceClient(base_url=address, give_up_after_s=FAR_S) as service,
        pytest.raises(tinsmith.UnimplementedError),
    ):
        service.get_server_capabilities()
    with pytest.raises(grpc.RpcError) as refused:
        connect(address)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TINSMITH_CA_FILE": "{absent}"}, "TINSMITH_CA_FILE: cannot read .*No such file"),
        ({"TINSMITH_CA_FILE": "{key}"}, "TINSMITH_CA_FILE: .* there is no certificate in it"),
        ({"TINSMITH_KEY_FILE": "{key}"}, "TINSMITH_CERTIFICATE_FILE: must be set, as"),
        (
            {"TINSMITH_KEY_FILE": "{ca}", "TINSMITH_CERTIFICATE_FILE": "{ca}"},
            "TINSMITH_KEY_FILE: .* there is no private key in it",
        ),
    ],
)
def test_a_file_that_is_none_is_named(
    variables: dict[str, str], message: str, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is sent; without TLS nobody looks."""
    known = {"absent": "/nowhere", "key": ports.issued.key, "ca": ports.issued.ca}
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(**known))
    with pytest.raises(tinsmith.InvalidArgumentError, match=message):
        tinsmith.ServiceClient(base_url="https://localhost:1")
    with pytest.raises(tinsmith.InvalidArgumentError, match=message):
        connect("https://localhost:1")
    tinsmith.ServiceClient(base_url="localhost:1").close()


def test_files_that_are_replaced_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be used meanwhile is passed over."""
    monkeypatch.setattr(channels, "LOOK_INTERVAL_S", 0.0)
    issued = Issued(tmp_path)
    credentials = channels.Credentials(TlsFiles(str(issued.ca)))
    first = credentials.current()
    assert credentials.current() is first
    issued.ca.write_text("half")
    assert credentials.current() is first
    issued.ca.write_bytes(Issued(tmp_path / "next").ca.read_bytes())
    assert credentials.current() is not first


@pytest.mark.parametrize(
    ("address", "key", "warned"),
    [
        ("far.invalid:1", "tml-x", True),
        ("https://far.invalid:1", "tml-x", False),
        ("127.0.0.1:1", "tml-x", False),
        ("far.invalid:1", "", False),
    ],
)
def test_a_key_in_plain_text_is_warned_of(
    address: str, key: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it leaves this machine; the line has no key."""
    tinsmith.ServiceClient(base_url=address, api_key=key).close()
    said = [record.getMessage() for record in caplog.records]
    assert ["in plain text" in line for line in said] == [True] * warned
    assert not any("tml-x" in line for line in said)
