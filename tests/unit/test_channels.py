"""Every channel of the servers is opened in one place."""

import ast
from pathlib import Path

SERVICES = Path(__file__).parents[2] / "services" / "tinsmithd"
OPENS = ("insecure_channel", "secure_channel")


def test_every_channel_is_opened_in_one_place() -> None:
    """Keepalive and the way past proxies are there for all or for none."""
    found = set()
    for file in SERVICES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name in OPENS:
                found.add(str(file.relative_to(SERVICES)))
    assert found == {"rpc/channels.py"}
