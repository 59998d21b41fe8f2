"""Bodies that nobody sends by accident, at OpenAI's API: each has an answer, none is a fault."""

import gzip
import http.client
import json
import random
import time
from pathlib import Path
from typing import Any

from attack.amount import SEED, amount
from gateways import RunningGateway

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GROWN_BYTES_MAX = 200 * 1024 * 1024
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        CHAT,
        {
            "model": "tiny-llama",
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ],
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x", "yz"],
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"a": [1]},
            "tools": [TOOL],
            "tool_choice": "none",
        },
    ),
    (
        TEXT,
        {
            "model": "tiny-llama",
            "prompt": [[1, 2], [3, 4]],
            "max_tokens": 2,
            "n": 2,
            "seed": 7,
            "temperature": 1.0,
            "top_p": 0.5,
            "logprobs": 1,
            "echo": True,
            "stop": "x",
        },
    ),
    (TEXT, {"model": "tiny-llama", "prompt": ["a", "b"], "max_tokens": 0, "echo": True}),
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    "",
    "a",
    "\0",
    "\ufffd" * 50,
    "x" * 5000,
    "{{ messages }}{% raw %}",
    "tinker://a/sampler_weights/b",
    [],
    [[]],
    [None],
    [[1, "a"]],
    {},
    {"type": "text"},
    {"a": {"b": {"c": []}}},
    [{"role": "user"}] * 3,
]


class Asker:
    """Asks over one connection, and opens another one where the gateway ended it."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._host = gateway.url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(self._host, timeout=60)

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> int:
        """The status; fails where what comes with it is no JSON of OpenAI's form, or no stream."""
        try:
            response, text = self._posted(path, body, headers)
        except (http.client.HTTPException, ConnectionError):  # it was idle, and has ended
            self._connection = http.client.HTTPConnection(self._host, timeout=60)
            response, text = self._posted(path, body, headers)
        if response.headers["content-type"].startswith("text/event-stream"):
            assert text.endswith(b"data: [DONE]\n\n")
        elif response.status == 200:
            assert json.loads(text)["choices"]
        else:
            assert json.loads(text)["error"]["message"]
        return response.status

    def _posted(
        self, path: str, body: bytes, headers: dict[str, str] | None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request("POST", path, body, headers=headers or {})
        response = self._connection.getresponse()
        return response, response.read()


def mutated(body: Any, chance: random.Random) -> Any:
    """The same with one value, somewhere, that is another one, or a key that is gone."""
    if isinstance(body, dict | list) and body and chance.random() < 0.8:
        body = body.copy()
        key = chance.choice(list(body) if isinstance(body, dict) else range(len(body)))
        if chance.random() < 0.1:
            del body[key]
        else:
            body[key] = mutated(body[key], chance)
        return body
    return chance.choice(VALUES)


def garbled(data: bytes, chance: random.Random) -> bytes:
    """The same text with some bytes changed, cut out or doubled."""
    data_list = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data_list))
        data_list[at : at + chance.randint(0, 3)] = chance.choice(
            [b"", b'"', b"[", b"}", b"\xff", b"\\ud800", b"9" * 50, bytes([chance.randrange(256)])]
        )
    return bytes(data_list)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def test_every_mutated_body_has_an_answer(gateway: RunningGateway) -> None:
    """200 or what is wrong with it, never 500; what they leave behind is bounded."""
    chance = random.Random(SEED)
    asker = Asker(gateway)
    seen: dict[int, int] = {}
    before, slowest_s = _resident_bytes(gateway.pid), 0.0
    for number in range(amount(250)):
        path, body = chance.choice(BODIES)
        if number % 2:
            changed: Any = dict(body)
            for _ in range(chance.randint(1, 2)):
                changed = mutated(changed, chance)
            data = json.dumps(
                {**changed, "stream": number % 8 == 1} if isinstance(changed, dict) else changed
            ).encode()
        else:
            data = garbled(json.dumps(body).encode(), chance)
        begun_s = time.monotonic()
        status = asker.post(path, data)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        seen[status] = seen.get(status, 0) + 1
        assert status in (200, 400, 404), (status, path, data[:2000])
    assert seen.keys() >= {200, 400, 404}, seen
    grown = _resident_bytes(gateway.pid) - before
    print(f"statuses {seen}, slowest {slowest_s:.2f} s, grown {grown:,}")
    assert grown < GROWN_BYTES_MAX


def test_what_is_large_or_deep_is_refused_at_once(gateway: RunningGateway) -> None:
    """In bounded memory: of a body as large as may be, a text for each byte too."""
    asker = Asker(gateway)
    plain = {"model": "tiny-llama", "max_tokens": 2}
    chat = {**plain, "messages": [{"role": "user", "content": "a"}]}
    deep = "[" * 3_000_000 + "]" * 3_000_000
    before = _resident_bytes(gateway.pid)
    for path, body, status in [
        (TEXT, b" " * 9_000_000, 413),
        (TEXT, deep.encode(), 400),
        (TEXT, json.dumps(plain)[:-1].encode() + b', "prompt": ' + deep.encode() + b"}", 400),
        (CHAT, json.dumps(chat)[:-1].encode() + b', "tools": ' + deep.encode() + b"}", 400),
        (TEXT, json.dumps({**plain, "prompt": [0] * 1_000_000}).encode(), 400),
        (TEXT, json.dumps({**plain, "prompt": [[0]] * 1_500_000}).encode(), 400),
        (TEXT, json.dumps({**plain, "prompt": [""] * 60_000}).encode(), 400),
        (TEXT, json.dumps({**plain, "prompt": ["a", 1] * 30_000}).encode(), 400),
        (TEXT, json.dumps({**plain, "prompt": "a" * 8_000_000}).encode(), 400),
        (CHAT, json.dumps({**plain, "messages": [{}] * 300_000}).encode(), 400),
        (CHAT, json.dumps({**chat, "stop": ["a" * 7] * 100_000}).encode(), 400),
        (CHAT, json.dumps({**chat, "tools": [TOOL] * 9_000}).encode(), 400),
    ]:
        assert asker.post(path, body) == status, body[:100]
    assert _resident_bytes(gateway.pid) - before < 700_000_000
    assert asker.post(CHAT, json.dumps(chat).encode()) == 200


def test_a_body_that_is_packed_is_bounded_as_it_is_unpacked(gateway: RunningGateway) -> None:
    asker = Asker(gateway)
    bomb = gzip.compress(bytes(200_000_000), 1)
    assert asker.post(TEXT, bomb, {"Content-Encoding": "gzip"}) == 413
    assert asker.post(TEXT, b"{}", {"Content-Encoding": "gzip"}) == 400
    small = json.dumps({"model": "tiny-llama", "prompt": "a", "max_tokens": 1}).encode()
    assert asker.post(TEXT, gzip.compress(small), {"Content-Encoding": "gzip"}) == 200
