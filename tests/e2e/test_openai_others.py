"""What other programs send to OpenAI's API: served, or refused in its form with the field's name.

Bodies as agents' frameworks and their adapters write them: with what they always add, empty lists,
nulls, and fields that are OpenAI's own.
"""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from gateways import RunningGateway, ask

MODEL = "tiny-llama"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAY: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        "strict": False,
    },
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": ""}}
    ],
}
ADDED: list[dict[str, Any]] = [
    {"stop": None, "tools": [], "tool_choice": "none", "logit_bias": {}, "n": 1},
    {"response_format": {"type": "text"}, "frequency_penalty": 0.0, "presence_penalty": 0},
    {"user": "u-1", "store": False, "metadata": {"run": "7"}, "service_tier": "auto"},
    {"stream_options": None, "seed": None, "logprobs": False, "top_logprobs": None},
    {"max_completion_tokens": 2, "max_tokens": None, "reasoning_effort": "low"},
    {"max_retries": 3, "extra": {"deep": [1, {"a": None}]}, "drop_params": True},
    {"parallel_tool_calls": True, "functions": [], "function_call": "none"},
    {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"},
    {"stop": [], "logit_bias": None, "response_format": None, "modalities": ["text"]},
    {"stop": "\n", "temperature": 0, "top_p": 1},
    {"tools": [TOOL], "tool_choice": "none"},
    {"messages": [{"role": "developer", "content": "Be brief."}, *SAY]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    {
        "messages": [
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ],
            },
            *SAY,
        ]
    },
    {
        "messages": [
            *SAY,
            CALLED,
            {"role": "tool", "tool_call_id": "call_1", "content": "found", "name": None},
        ]
    },
    {"messages": [{"role": "user", "content": "hi", "name": "me"}, {"role": "assistant"}]},
]


def events(data: bytes) -> list[Any]:
    """What a stream says, without its end."""
    lines = [line[6:] for line in data.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post(gateway: RunningGateway, path: str, body: Any) -> tuple[int, Any]:
    """Status, and JSON or the events of a stream."""
    request = urllib.request.Request(gateway.url + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            data = response.read()
            if "event-stream" in response.headers["content-type"]:
                return response.status, events(data)
            return response.status, json.loads(data)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("added", ADDED, ids=[",".join(each) for each in ADDED])
def test_what_changes_nothing_is_served(gateway: RunningGateway, added: dict[str, Any]) -> None:
    """Whole, and as a stream."""
    body = {"model": MODEL, "messages": SAY, "max_tokens": 2, **added}
    status, made = post(gateway, CHAT, body)
    assert status == 200, made
    assert made["choices"][0]["message"]["role"] == "assistant"
    status, stream = post(gateway, CHAT, {**body, "stream": True})
    assert status == 200
    assert stream[0]["choices"][0]["delta"]["role"] == "assistant"


def test_several_choices_are_streamed_with_what_they_took(gateway: RunningGateway) -> None:
    """`n` with `stream`, and `include_usage`: the last event has no choice."""
    body = {"model": MODEL, "messages": SAY, "max_completion_tokens": 3, "n": 3, "stream": True}
    body["stream_options"] = {"include_usage": True, "include_obfuscation": False}
    status, stream = post(gateway, CHAT, body)
    assert status == 200
    assert {each["index"] for event in stream for each in event["choices"]} == {0, 1, 2}
    assert stream[-1]["choices"] == []
    assert 3 <= stream[-1]["usage"]["completion_tokens"] <= 9
    assert all(event["usage"] is None for event in stream[:-1])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"logit_bias": {"50256": -100}}, "logit_bias"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": "2"}, "n"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": 2}, "top_p"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": {"a": 1}}, "stop"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": 5}, "stream_options"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, "tools"),
    (CHAT, {"tools": [TOOL]}, "tools"),  # which this model's template does not take
    (CHAT, {"model": "gpt-4o"}, "model"),
    (CHAT, {"model": None}, "model"),
    (COMPLETION, {"prompt": [[], [1]]}, "prompt"),
    (COMPLETION, {"best_of": 4}, "best_of"),
    (COMPLETION, {"suffix": "end"}, "suffix"),
    (COMPLETION, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETION, {"prompt": None}, "prompt"),
    (COMPLETION, {"logprobs": True}, "logprobs"),
]


@pytest.mark.parametrize(("path", "added", "field"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(
    gateway: RunningGateway, path: str, added: dict[str, Any], field: str
) -> None:
    """In OpenAI's form, as a stream too: a refusal comes before the stream begins."""
    asked: dict[str, Any] = {"messages": SAY} if path == CHAT else {"prompt": "hi"}
    body = {"model": MODEL, **asked, "max_tokens": 1, **added}
    for stream in (False, True):
        whole = {**body, "stream": True} if stream and "stream" not in added else body
        status, said = post(gateway, path, whole)
        assert status in (400, 404), said
        assert said["error"]["param"].startswith(field), said
        assert said["error"]["type"] == "invalid_request_error"
        assert said["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/embeddings", "/v1/", "/v1/chat/completions/x", "/oai/api/v1/x"]
)
def test_what_is_not_served_says_so_in_the_same_form(gateway: RunningGateway, path: str) -> None:
    """Whatever the method."""
    for method in ("GET", "POST", "DELETE"):
        status, said = ask(gateway, path, None, method=method)
        assert status == 404
        assert said["error"]["message"]
