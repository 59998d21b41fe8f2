"""A cluster behind a proxy that speaks TLS: `https://host` is an address like any other."""

import asyncio
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import programs
import tinsmith
from faults.peer import Peer
from tinsmith.addresses import service_address

PROGRAM = """
import sys, tinsmith

service = tinsmith.ServiceClient(base_url=sys.argv[1], give_up_after_s=float(sys.argv[2]))
trainer = service.create_lora_training_client("base").result()
prompt = tinsmith.ModelInput.from_ints([1, 2])
trainer.forward_backward([tinsmith.Datum(prompt, {"target_tokens": [1, 2]})], "cross_entropy")
trainer.optim_step(tinsmith.AdamParams()).result()
sampler = service.create_sampling_client(base_model="base").result()
assert sampler.sample(prompt, 1, tinsmith.SamplingParams(max_tokens=2)).result().sequences
rest = tinsmith.RestClient(base_url=sys.argv[1])
rest.delete_checkpoint_from_tinker_path("tinsmith://m/weights/0").result()
print("done")
"""


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate of localhost, with its key, that nobody else vouches for."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl to make a certificate with")
    file = tmp_path / "localhost.pem"
    command: list[str | Path] = [openssl, "req", "-x509", "-nodes", "-days", "1"]
    command += ["-newkey", "rsa:2048", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", file, "-out", file]
    subprocess.run(command, check=True, capture_output=True)
    certificate = file.read_text().partition("-----BEGIN CERT")
    (tmp_path / "roots.pem").write_text("".join(certificate[1:]))
    return file


@pytest.fixture
def proxy(peer: Peer, authority: Path) -> Iterator[str]:
    """Speaks TLS, and passes what is in it on to `peer`; its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority)
    context.set_alpn_protocols(["h2"])
    loop = asyncio.new_event_loop()
    host, _, port = peer.address.rpartition(":")

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
        target.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"localhost:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def run(url: str, give_up_after_s: float, roots: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM, url, str(give_up_after_s)]
    environment = programs.variables(GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=roots)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_all_services_are_reached_with_tls(peer: Peer, proxy: str, authority: Path) -> None:
    """With roots that vouch for the proxy; without them nothing is sent."""
    peer.servicer.checkpoints.add("tinsmith://m/weights/0")
    done = run(f"https://{proxy}/", 30, str(authority.with_name("roots.pem")))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    refused = run(f"https://{proxy}", 600, "")
    assert "InvalidArgumentError" in refused.stderr, "at once: no repeat mends that"
    assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr


def test_what_is_named_over_tls_is_reached_with_tls() -> None:
    """Whatever a cluster says of its other services: nobody is led to plain text."""
    base = "https://cluster:443"
    assert service_address("sampler", base, "") == base
    assert service_address("checkpoint", base, ":50053") == "https://cluster:50053"
    assert service_address("sampler", base, "a:1, b:2") == "https://a:1,https://b:2"
    assert service_address("checkpoint", "cluster:1", "there:2") == "there:2"
    with pytest.raises(tinsmith.InvalidArgumentError, match="user"):
        tinsmith.ServiceClient(base_url="https://key:secret@host")
