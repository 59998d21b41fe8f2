"""Where an object store is, and what opens it: what is refused, and whom a server trusts."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import Issued
from tinsmithd.checkpoint.place import place_of
from tinsmithd.checkpoint.store import StoreUnusable, whole
from tinsmithd.checkpoint.store.object.bucket import Bucket
from tinsmithd.config import CheckpointConfig
from tinsmithd.errors import Unavailable

URL = "s3://bucket/prefix"
KEYS = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}


class Empty(http.server.BaseHTTPRequestHandler):
    """A store with nothing in it."""

    def do_GET(self) -> None:
        """Say so."""
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def issued(tmp_path: Path) -> Issued:
    """The certificate of a store, by an authority that no machine knows."""
    return Issued(tmp_path / "tls")


@pytest.fixture
def endpoint(issued: Issued) -> Iterator[str]:
    """A store that speaks TLS."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.certificate, issued.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_store_is_trusted_by_the_authorities_of_the_settings(
    endpoint: str, issued: Issued
) -> None:
    config = CheckpointConfig(store_url=URL, store_ca_file=str(issued.ca))
    place = place_of(config)
    assert place is not None
    options = {"endpoint": endpoint, **KEYS}
    assert Bucket(place.url, options, place.authorities).get("anything") is None
    with pytest.raises(Unavailable) as caught:
        Bucket(place.url, options).get("anything")
    assert endpoint in whole(caught.value)


@pytest.mark.parametrize(
    ("setting", "content", "why"),
    [
        ("store_options_file", None, "No such file"),
        ("store_options_file", "{'secret': 1}", "is no JSON"),
        ("store_options_file", '["secret"]', "one object of names and texts"),
        ("store_options_file", '{"secret_access_key": 7}', "one object of names and texts"),
        ("store_ca_file", None, "No such file"),
        ("store_ca_file", "secret", "no certificate in it"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_not_shown(
    tmp_path: Path, setting: str, content: str | None, why: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    config = CheckpointConfig(**{"store_url": URL, setting: str(file)})
    with pytest.raises(StoreUnusable, match=f"{setting} {file}.*{why}") as caught:
        place_of(config)
    assert "secret" not in str(caught.value)


def test_what_opens_a_store_is_not_in_its_text(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"secret_access_key": "hidden"}')
    place = place_of(CheckpointConfig(store_url=URL, store_options_file=str(file)))
    assert place is not None
    assert place.options == {"secret_access_key": "hidden"}
    assert "hidden" not in repr(place)
