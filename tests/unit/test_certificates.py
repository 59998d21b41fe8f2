"""What is wrong with a certificate is said at the start, in a sentence that names the setting."""

import datetime
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from certificates import EXPIRED, Issued
from tinsmithd.config import CheckpointConfig, ConfigError, GatewaySettings, TrainingConfig
from tinsmithd.processes import EXIT_HOPELESS
from tinsmithd.tls import Certificates, Files, certificates, throw_away


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    return Issued(tmp_path / "tls")


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LOOK_INTERVAL_S", 0.0)


def files(issued: Issued) -> Files:
    return Files(
        "training",
        "cluster_tls",
        *(str(issued.certificate), str(issued.key), str(issued.ca), "cluster_tls_ca_file"),
    )


def _encrypted(issued: Issued) -> None:
    key = load_pem_private_key(issued.key.read_bytes(), None)
    how = BestAvailableEncryption(b"secret")
    issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))


def _ed25519(issued: Issued) -> None:
    key = Ed25519PrivateKey.generate()
    issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _not_begun(issued: Issued) -> None:
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    issued.renew(begins=tomorrow)


DAMAGES: dict[str, tuple[Callable[[Issued], object], str]] = {
    "absent": (lambda i: i.key.unlink(), "cluster_tls_key_file: cannot read .*No such file"),
    "a folder": (
        lambda i: (i.ca.unlink(), i.ca.mkdir()),
        "cluster_tls_ca_file: cannot read .*directory",
    ),
    "empty": (
        lambda i: i.certificate.write_text(""),
        "cluster_tls_certificate_file: .*no certificate in",
    ),
    "the key": (
        lambda i: i.certificate.write_bytes(i.key.read_bytes()),
        "cluster_tls_certificate_file: .*no certificate in it",
    ),
    "cut": (
        lambda i: i.ca.write_bytes(i.ca.read_bytes()[:200]),
        "cluster_tls_ca_file: .*: a certificate in it cannot be read",
    ),
    "no key": (lambda i: i.key.write_text("x"), "cluster_tls_key_file: .*no private key in it"),
    "a passphrase": (_encrypted, "cluster_tls_key_file: .*it has a passphrase"),
    "of another kind": (_ed25519, "cluster_tls_key_file: .*RSA and ECDSA keys, it is Ed25519"),
    "of another": (
        lambda i: i.key.write_bytes(i.authority.issue(("x",))[1]),
        "cluster_tls_key_file: .* is not the key of the first certificate in ",
    ),
    "expired": (
        lambda i: i.renew(**EXPIRED),
        "cluster_tls_certificate_file: .*expired on 2020-01-02",
    ),
    "early": (_not_begun, "cluster_tls_certificate_file: .*it is good from "),
    "huge": (
        lambda i: i.ca.write_bytes(b"x" * (1 << 20) + b"x"),
        "cluster_tls_ca_file: .*has more than 1048576 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named(issued: Issued, damage: str) -> None:
    """With the setting and the file; and what is wrong later is never taken."""
    used = Certificates(files(issued))
    before = used.current()
    harm, message = DAMAGES[damage]
    harm(issued)
    with pytest.raises(ConfigError, match=f"^training.{message}"):
        Certificates(files(issued))
    assert used.current() is before


def test_what_is_replaced_is_read_again(issued: Issued, caplog: pytest.LogCaptureFixture) -> None:
    """Once, whoever asks; a pair that is half written is passed over."""
    caplog.set_level(logging.INFO)
    used = Certificates(files(issued))
    before = used.current()
    certificate, key = issued.authority.issue(("localhost",))
    issued.key.write_bytes(key)
    assert used.current() is before
    issued.certificate.write_bytes(certificate)
    after = used.current()
    assert (after.chain, after.key, list(after.names)) == (certificate, key, ["localhost"])
    assert used.current() is after
    said = [record.getMessage() for record in caplog.records]
    assert ["stays in use" in line for line in said] == [True, False]
    assert "again: good until" in said[1]
    assert key.decode() not in repr(after)


def test_a_link_that_leads_elsewhere_counts(issued: Issued, tmp_path: Path) -> None:
    """Kubernetes replaces the folder behind a link, never a file."""
    other = Issued(tmp_path / "other", issued.authority)
    link = tmp_path / "now"
    link.symlink_to(tmp_path / "tls")
    names = [str(link / name) for name in ("tls.crt", "tls.key", "ca.crt")]
    used = Certificates(Files("training", "cluster_tls", *names, "cluster_tls_ca_file"))
    assert used.current().chain == issued.certificate.read_bytes()
    (tmp_path / "next").symlink_to(tmp_path / "other")
    os.replace(tmp_path / "next", link)
    assert used.current().chain == other.certificate.read_bytes()


def test_one_that_ages_is_warned_of(issued: Issued, caplog: pytest.LogCaptureFixture) -> None:
    """From two weeks before its end on, once a day; its successor is not."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=13)
    issued.renew(ends=soon)
    used = Certificates(files(issued))
    used.current()
    assert [r.getMessage().partition(" expires in 1")[1] for r in caplog.records] == [
        " expires in 1"
    ]
    assert used.left_s == pytest.approx(13 * 86_400, abs=60)
    issued.renew()
    used.current()
    assert len(caplog.records) == 1
    assert used.left_s is not None
    assert used.left_s > 300 * 86_400


@pytest.mark.parametrize(
    ("names", "address", "warned"),
    [
        (("localhost",), "127.0.0.1:1", True),
        (("localhost", "127.0.0.1"), "127.0.0.1:1", False),
        (("localhost",), "0.0.0.0:1", False),
        (("*.example",), "a.example:1", False),
        (("*.example",), "a.b.example:1", True),
        (("::1",), "[::1]:1", False),
        (("spiffe://cluster/training",), "localhost:1", True),
    ],
)
def test_a_name_that_it_is_not_for_is_warned_of(
    issued: Issued,
    names: tuple[str, ...],
    address: str,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the address says one."""
    issued.renew(names)
    Certificates(files(issued)).warn_of_names(address)
    assert ["will refuse it" in record.getMessage() for record in caplog.records] == [True] * warned


def test_settings_that_do_not_go_together_are_refused() -> None:
    """Before any file is looked at."""
    for kind, given, message in (
        (TrainingConfig, {"tls_certificate_file": "x"}, "tls_key_file: must be set where"),
        (GatewaySettings, {"tls_key_file": "x"}, "tls_certificate_file: must be set where"),
        (TrainingConfig, {"tls_client_ca_file": "x"}, "tls_certificate_file: must be set where"),
        (
            CheckpointConfig,
            {"cluster_tls_certificate_file": "x", "cluster_tls_key_file": "x"},
            "cluster_tls_ca_file: must be set where",
        ),
        (
            CheckpointConfig,
            {"cluster_address": "127.0.0.1:0", "cluster_tls_ca_file": "x"},
            "cluster_tls_certificate_file: must be set where cluster_address is",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            kind(**given)


def test_plain_text_over_a_network_is_warned_of() -> None:
    """Whoever is called there, and whoever calls."""
    far = TrainingConfig(
        checkpoint_target="checkpoint:50053", link_address="0.0.0.0:1", link_secret_file="x"
    )
    assert ["in plain text" in line for line in far.warnings()] == [True, True]
    near = TrainingConfig(checkpoint_target="127.0.0.1:1", link_address="[::1]:0")
    assert near.warnings() == []


def test_a_server_that_cannot_use_its_certificate_ends(issued: Issued, tmp_path: Path) -> None:
    """With the status for what a restart does not mend."""
    issued.key.unlink()
    given = {"data_folder": tmp_path / "data", "listen_address": "127.0.0.1:0"}
    env = {f"TINSMITH_CHECKPOINT_{key.upper()}": str(value) for key, value in given.items()}
    env |= {f"TINSMITH_CHECKPOINT_{k.upper()}": v for k, v in issued.settings("tls").items()}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "tinsmithd.checkpoint"]
    ended = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert ended.returncode == EXIT_HOPELESS
    assert ended.stderr.splitlines()[-1].startswith(
        "tinsmithd.checkpoint: checkpoint.tls_key_file: cannot read "
    )


def test_what_is_thrown_away_stays_while_it_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its user alone, without the key that could sign more; then others are made."""
    folder = tmp_path / "data" / "tls"
    first = throw_away(folder)
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    keys = [name for name, data in content.items() if b"PRIVATE KEY" in data]
    assert keys == ["server.key"]
    assert throw_away(folder) == first
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    monkeypatch.setattr("tinsmithd.tls.throwaway.LEFT_DAYS_MIN", 400)
    throw_away(folder)
    assert first.ca_file.read_bytes() != content["ca.pem"]
