"""The kinds of value that settings have, and words for what each of them takes."""

import ipaddress
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MIB = 1024 * 1024
LINK_ADDRESS = "127.0.0.1:50054"
"""Where ranks attach if nothing else is said."""
PORT_MAX = 65_535


def _not_bool(value: object) -> object:
    # Python takes true for 1; a person who writes it means something else.
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "must be a number")
    return value


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        ValueError: It is not host:port.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise ValueError("must be host:port")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address (host:port)."""
    host, _ = parse_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def leaves_this_machine(target: str) -> bool:
    """Whether calls to a target of gRPC go over a network, as far as its text says."""
    if target.startswith(("unix:", "unix-abstract:")):
        return False
    try:
        return not is_loopback(target)
    except ValueError:  # such as `dns:///trainer:50054`
        return True


def _address(text: str) -> str:
    parse_address(text)
    return text


def _address_or_empty(text: str) -> str:
    return text and _address(text)


def _endpoint(text: str) -> str:
    scheme, separator, address = text.partition("://")
    if text and (not separator or scheme not in ("http", "https")):
        raise ValueError("must begin with http:// or https://")
    _address_or_empty(address)
    return text


Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
"""A whole number that may be 0."""
Positive = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
"""A whole number from 1 on."""
Number = Annotated[float, BeforeValidator(_not_bool), Field(ge=0)]
"""A number, such as of seconds, that may be 0."""
AboveZero = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]
"""A number above 0, such as of seconds."""
Required = Annotated[str, Field(min_length=1)]
"""A text that somebody has to give."""
Address = Annotated[str, AfterValidator(_address), Field(json_schema_extra={"is": "host:port"})]
"""`host:port`."""
OptionalAddress = Annotated[
    str, AfterValidator(_address_or_empty), Field(json_schema_extra={"is": "host:port or empty"})
]
Endpoint = Annotated[
    str,
    AfterValidator(_endpoint),
    Field(json_schema_extra={"is": "http://host:port, https://host:port or empty"}),
]
"""A collector that speaks gRPC."""
LogFormat = Literal["text", "json"]
"""How a line of a log is written."""
ZeroStage = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, le=3)]
"""A stage of DeepSpeed's ZeRO."""
Dtype = Literal["float32", "bfloat16"]
NativeUse = Literal["exact", "always", "never"]
"""When the Sampler computes with compiled kernels."""
"""Element type of frozen weights."""
SamplerDtype = Literal["auto", "float32", "bfloat16"]
"""The same; `auto` leaves it to the Sampler."""
SamplerEngine = Literal["transformers", "vllm"]
"""What computes in a Sampler."""
Determinism = Literal["auto", "always", "never"]
"""When GPUs are to give the same bits each time."""
TrainerEngine = Literal["deepspeed", "reference"]
"""What computes on a rank."""

Names = dict[str, str]
"""A table from names to names."""

NUMBERS = ("a whole number", "a number")
_KINDS: dict[object, str] = {
    int: NUMBERS[0],
    float: NUMBERS[1],
    bool: "true or false",
    Names: "a table of texts",
}


def bounds_of(field: FieldInfo) -> str:
    """What a setting takes among values of its kind, such as "at least 1"; empty for all."""
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(field.annotation)))}"
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["is"])
    if any(isinstance(bound, MinLen) for bound in field.metadata):
        return "set"
    # A setting may narrow the bounds of its kind.
    least, above, most = _all(field, Ge, "ge"), _all(field, Gt, "gt"), _all(field, Le, "le")
    found = [f"at least {max(least)}"] if least else []
    found += [f"above {max(above)}"] if above else []
    found += [f"at most {min(most)}"] if most else []
    return " and ".join(found)


def _all(field: FieldInfo, kind: type, name: str) -> list[Any]:
    return [getattr(bound, name) for bound in field.metadata if isinstance(bound, kind)]


def choices_of(field: FieldInfo) -> Sequence[object] | None:
    """All values that a setting takes, in order; None where there are too many to list."""
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    least, most = _all(field, Ge, "ge"), _all(field, Le, "le")
    return range(max(least), min(most) + 1) if field.annotation is int and least and most else None


def kind_of(field: FieldInfo) -> str:
    """What a setting is, such as "a whole number"."""
    return _KINDS.get(field.annotation, "a text")


def is_secret(field: FieldInfo) -> bool:
    """Whether its value may be shown to nobody."""
    return field.annotation is SecretStr


def default_of(field: FieldInfo) -> object:
    """Its default as plain text or number; a secret has an empty one."""
    default = field.default
    return default.get_secret_value() if isinstance(default, SecretStr) else default
