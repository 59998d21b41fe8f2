"""What clients of OpenAI's API may send: fields, their types and bounds.

As at OpenAI, fields that nobody knows are passed over, and null is as good as nothing. What is
known and cannot be done is refused, unless it asks for what happens anyway.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import PydanticCustomError

from tinsmithd.gateway.problems import Problem
from tinsmithd.text import bounded

INT32_MAX = 2**31 - 1
MESSAGES_MAX = 4096
"""Messages of one chat. Some templates look at each message for each message."""
STRUCTURES_MAX = 400_000
"""Brackets and braces that open something in one body; each is an object in memory, and Python's
collector looks at all of them while they come."""
PROMPTS_MAX = 65_536
"""Prompts of one request; the setting `openai_choices_max` is usually less."""
TOOLS_MAX = 128
PARTS_MAX = 1024
TEMPLATE_ARGUMENTS_MAX = 32
SHOWN_BYTES_MAX = 200
_WRONG, _UNSUPPORTED = "wrong", "unsupported"

M = TypeVar("M", bound=BaseModel)


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError(_WRONG, "{why}", {"why": message})


def _only(*neutral: object) -> object:
    """The type of a field that may not be used: it takes null and what changes nothing."""

    def check(value: object) -> None:
        for each in neutral:
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return
        if value is not None:
            raise PydanticCustomError(_UNSUPPORTED, "is not supported")

    return Annotated[Any, BeforeValidator(check)]


def _stops(value: object) -> list[str] | None:
    found = [value] if isinstance(value, str) else value
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise _wrong("must be a string or an array of strings")
    if not all(found):
        raise _wrong("must have no empty string")
    return found


def _is_tokens(value: object) -> bool:
    # A set of types, not a loop: there may be millions.
    return isinstance(value, list) and set(map(type, value)) <= {int}


Prompts = Sequence[str] | Sequence[Sequence[int]]


def _prompts(value: object) -> Prompts:
    """A prompt in any of its four forms as a list of texts, or of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        prompts = [value] if _is_tokens(value) else value
        if len(prompts) > PROMPTS_MAX:
            raise _wrong(f"must be at most {PROMPTS_MAX} prompts")
        if all(isinstance(each, str) for each in value):
            return value
        for index, each in enumerate(prompts):
            if not _is_tokens(each):
                break
            if each and not 0 <= min(each) <= max(each) <= INT32_MAX:
                raise _wrong(f"[{index}] has a number that is no token")
        else:
            return prompts
    raise _wrong("must be a string, an array of strings, of tokens, or of arrays of tokens")


def _content(value: object) -> str | None:
    """What a message says, as one text: that is what chat templates take."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > PARTS_MAX:
        raise _wrong("must be a string or an array of parts")
    texts: list[str] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            shown = bounded(repr(kind), 60)
            raise _wrong(f"[{index}].type must be 'text', is {shown}: models here read text alone")
        text = part.get(kind)
        if not isinstance(text, str):
            raise _wrong(f"[{index}].{kind} must be a string")
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(value: object) -> list[dict[str, Any]] | None:
    """Calls that a model made before; templates want their arguments as objects."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > TOOLS_MAX:
        raise _wrong(f"must be an array of at most {TOOLS_MAX} calls")
    found: list[dict[str, Any]] = []
    for index, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"[{index}].function.name must be a string")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")  # a call without any
            except (ValueError, RecursionError):
                raise _wrong(f"[{index}].function.arguments must be JSON") from None
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _tools(value: object) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > TOOLS_MAX:
        raise _wrong(f"must be an array of at most {TOOLS_MAX} tools")
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise _wrong(f"[{index}].type must be 'function'")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"[{index}].function.name must be a string")
    return value or None


class StreamOptions(BaseModel):
    """What a stream has besides."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class Asked(BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    n: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: _only(0) = None  # type: ignore[valid-type]
    presence_penalty: _only(0) = None  # type: ignore[valid-type]
    repetition_penalty: _only(1) = None  # type: ignore[valid-type]
    min_p: _only(0) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]

    @property
    def samples(self) -> int:
        """How many samples of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionAsked(Asked):
    """The body of `/v1/completions`."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None

    best_of: _only(1) = None  # type: ignore[valid-type]
    suffix: _only("") = None  # type: ignore[valid-type]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[dict[str, Any]] | None, BeforeValidator(_tool_calls)] = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it. They know no `developer`, which is a newer `system`."""
        role = "system" if self.role == "developer" else self.role
        others = {"name", "reasoning_content", "tool_calls", "tool_call_id"}
        rest = self.model_dump(include=others, exclude_none=True)
        return {"role": role, "content": self.content or "", **rest}


class ChatAsked(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[
        list[Message], FailFast(), Field(min_length=1, max_length=MESSAGES_MAX, strict=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(_tools)] = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Field(max_length=TEMPLATE_ARGUMENTS_MAX)] | None
    ) = None

    functions: _only([]) = None  # type: ignore[valid-type]
    function_call: _only("none") = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    prediction: _only() = None  # type: ignore[valid-type]
    web_search_options: _only() = None  # type: ignore[valid-type]


def read(kind: type[M], body: bytes) -> M:
    """Read a request's body.

    Raises:
        Problem: 400 that names the first field that is wrong.
    """
    if body.count(b"[") + body.count(b"{") > STRUCTURES_MAX:
        raise Problem(400, f"the body has more than {STRUCTURES_MAX} arrays and objects")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
    path = _path(found["loc"])
    if found["type"] == "json_invalid":
        raise Problem(400, f"the body is no JSON: {bounded(found['msg'], SHOWN_BYTES_MAX)}")
    if not path:
        raise Problem(400, "the body must be a JSON object")
    reason = {"missing": "MISSING_FIELD", _UNSUPPORTED: "UNSUPPORTED_PARAMETER"}
    glue = "" if found["msg"].startswith("[") else ": "
    message = bounded(f"{path}{glue}{_lower(found['msg'])}", 2 * SHOWN_BYTES_MAX)
    raise Problem(400, message, reason.get(found["type"], "INVALID_FIELD"), path)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _path(loc: tuple[int | str, ...]) -> str:
    """Where a field is, such as `messages[3].content`."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return bounded(parts.removeprefix("."), SHOWN_BYTES_MAX)
