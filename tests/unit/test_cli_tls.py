"""What the command says of TLS: whether a certificate is trusted, and for how long it is good."""

import datetime
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from certificates import EXPIRED, Issued
from commands import tinsmith
from tinsmith.cli.doctor import tls
from tinsmith.cli.failures import Failed
from tinsmith.cli.metrics import scrape
from tinsmithd.rpc.metrics import Metrics
from tinsmithd.tls import Certificates, Files


class Ports:
    """A server of nothing on a port for each certificate.

    Attributes:
        good, soon, expired: Ports; the second's certificate is good for five days.
        ca: File of the authority that vouches for all of them.
    """

    def __init__(self, folder: Path) -> None:
        good = Issued(folder / "good")
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=5)
        self._server = grpc.server(futures.ThreadPoolExecutor(1))
        self.good = self._add(good)
        self.soon = self._add(Issued(folder / "soon", good.authority, ends=ends))
        self.expired = self._add(Issued(folder / "expired", good.authority, **EXPIRED))
        self.ca = str(good.ca)
        self._server.start()

    def _add(self, issued: Issued) -> str:
        pair = (issued.key.read_bytes(), issued.certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair])
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        return f"https://127.0.0.1:{port}"

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    made = Ports(tmp_path_factory.mktemp("ports"))
    yield made
    made.stop()


def test_certificates(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted, not trusted, about to expire, expired, and none at all."""
    untrusted = tls.finding(ports.good)
    assert (untrusted.state, "TINSMITH_CA_FILE" in untrusted.hint) == ("wrong", True)
    monkeypatch.setenv("TINSMITH_CA_FILE", ports.ca)
    assert tls.finding(ports.good).state == "ok"
    soon = tls.finding(ports.soon)
    assert (soon.state, "expires in 5 d" in soon.found) == ("warning", True)
    expired = tls.finding(ports.expired)
    assert (expired.state, "expired" in expired.found) == ("wrong", True)
    monkeypatch.setenv("TINSMITH_CA_FILE", "/absent.pem")
    assert tls.finding(ports.good).state == "wrong"


@pytest.mark.parametrize(
    ("address", "state"),
    [("127.0.0.1:1", "ok"), ("localhost:1", "ok"), ("far.example:1", "warning")],
)
def test_plain_text(address: str, state: str) -> None:
    """Is worth a word where it leaves this machine."""
    assert tls.finding(address).state == state


def test_a_command_says_what_is_wrong(ports: Ports) -> None:
    """At once, by the client's own sentence; and the doctor by the same."""
    done = tinsmith("models", "ls", "--address", ports.good)
    assert done.status == 2
    assert "do not vouch for" in done.err
    found = tinsmith("doctor", "--json", "--address", ports.good).json["findings"]
    by_check = {each["check"]: each for each in found}
    assert by_check["TLS"]["state"] == "wrong"
    assert "do not vouch for" in by_check["training"]["found"]
    expired = tinsmith("status", "--address", ports.expired, TINSMITH_CA_FILE=ports.ca)
    assert (expired.status, "expired" in expired.err) == (2, True)


def test_metrics_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `https://host:port`, from a server that is vouched for."""
    issued = Issued(tmp_path)
    files = Files("training", "tls", str(issued.certificate), str(issued.key), "", "")
    metrics = Metrics()
    try:
        address = f"https://127.0.0.1:{metrics.serve('127.0.0.1:0', Certificates(files))}"
        with pytest.raises(Failed, match="CERTIFICATE_VERIFY_FAILED"):
            scrape(address)
        monkeypatch.setenv("TINSMITH_CA_FILE", str(issued.ca))
        assert scrape(address).sum("process_resident_memory_bytes")
    finally:
        metrics.close()
