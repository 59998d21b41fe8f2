"""Every channel is opened in one place of the servers, and in one of the client."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPENS = ("insecure_channel", "secure_channel")
PLACES = {
    # A probe runs every few seconds, and imports nothing of this project.
    "services/tinsmithd": {"rpc/channels.py", "rpc/probe.py"},
    "client/tinsmith": {"channels.py"},
}


@pytest.mark.parametrize("root", PLACES)
def test_every_channel_is_opened_in_one_place(root: str) -> None:
    """TLS, keepalive and the way past proxies are there for all or for none."""
    found = set()
    for file in (ROOT / root).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name in OPENS:
                found.add(str(file.relative_to(ROOT / root)))
    assert found == PLACES[root]
