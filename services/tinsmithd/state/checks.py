"""Parses the files of a state into checked values.

A state file is a claim: its types, ranges, sizes and shapes are checked, also against each other,
before anything is allocated for it. A refusal depends on the bytes alone, so all ranks refuse the
same files. The formats are safetensors and JSON; nothing here runs or unpacks anything.
"""

import codecs
import io
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tinsmithd.errors import Reason
from tinsmithd.tunings import TUNINGS, LoraConfig, Tuning

FORMAT_VERSION = 1
JSON_BYTES_MAX = 1024 * 1024
NAME_CHARACTERS_MAX = 512
LIST_ENTRIES_MAX = 1_024
NUMBER_CHARACTERS_MAX = 400
STEP_COUNT_MAX = 1 << 53
PIECE_BYTES = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


class StateInvalid(ValueError):
    """A state file is wrong.

    Attributes:
        file: Its name.
        field: The place in it, such as `lora.rank` or `["a.lora_A.weight"]`; empty for the whole.
        message: The fault, for a person.
        reason: The fault, for a program.
        metadata: Limit and value, for LIMIT_EXCEEDED.
    """

    def __init__(
        self,
        file: str,
        field: str,
        message: str,
        reason: Reason = Reason.INVALID_FIELD,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{file}{': ' if field else ''}{field}: {message}")
        self.file, self.field, self.message, self.reason = file, field, message, reason
        self.metadata = dict(metadata or {})


def over(file: str, field: str, limit: str, value: int, most: int) -> StateInvalid:
    """The error of a value over a limit."""
    metadata = {"limit": limit, "value": short(value)}
    message = f"{short(value)} is more than {limit} = {most}"
    return StateInvalid(file, field, message, Reason.LIMIT_EXCEEDED, metadata)


def short(value: object) -> str:
    """A value of somebody else's, cut and escaped."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- JSON -------------------------------------------------------------------------------------


def parse_json(file: str, data: bytes, bytes_max: int = JSON_BYTES_MAX) -> dict[str, Any]:
    """Read a JSON object in UTF-8, with no name twice and finite numbers only.

    Raises:
        StateInvalid: The bytes are no such object, or more than `bytes_max`.
    """
    if len(data) > bytes_max:
        raise over(file, "", "bytes", len(data), bytes_max)
    try:
        found = json.loads(
            data.decode(),
            object_pairs_hook=_pairs,
            parse_float=_number,
            parse_int=_integer,
            parse_constant=_number,
        )
    except (ValueError, RecursionError) as error:
        message = f"not JSON that is read here: {short(str(error))}"
        raise StateInvalid(file, "", message) from error
    if not isinstance(found, dict):
        raise StateInvalid(file, "", "not a JSON object")
    return found


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _number(text: str) -> float:
    if len(text) > NUMBER_CHARACTERS_MAX or not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > NUMBER_CHARACTERS_MAX:
        raise ValueError(f"{text[:20]} has too many digits")
    return int(text)


# --- model_state.json -------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """The content of `model_state.json`."""

    tuning: Tuning
    step_count: int
    has_optimizer: bool


def parse_about(file: str, data: bytes, tuning: Tuning | None) -> About:
    """Read `model_state.json`.

    Args:
        file: Its name.
        data: Its content.
        tuning: The tuning that it must have, but for the seed; None allows any.

    Raises:
        StateInvalid: An entry is missing, unknown, of another type or out of range.
    """
    found = parse_json(file, data)
    which = next((kind for kind in TUNINGS if kind in found), LoraConfig.kind)
    _check_names(file, "", found, ("format_version", which, "step_count", "has_optimizer"))
    check_integer(file, "format_version", found["format_version"], FORMAT_VERSION, FORMAT_VERSION)
    if type(found["has_optimizer"]) is not bool:
        raise StateInvalid(file, "has_optimizer", "not true or false")
    config = found[which]
    if not isinstance(config, dict):
        raise StateInvalid(file, which, "not a JSON object")
    said = _tuning(file, which, config)
    if tuning is not None:
        _check_same(file, which, said, tuning)
    step_count = check_integer(file, "step_count", found["step_count"], 0, STEP_COUNT_MAX)
    return About(said, step_count, found["has_optimizer"])


def _check_same(file: str, which: str, said: Tuning, tuning: Tuning) -> None:
    if type(said) is not type(tuning):
        raise StateInvalid(file, which, "the checkpoint is said to hold something else")
    for field in fields(said):
        ours, theirs = getattr(tuning, field.name), getattr(said, field.name)
        if field.name != "seed" and ours != theirs:
            message = f"{short(theirs)}, but the checkpoint is said to have {short(ours)}"
            raise StateInvalid(file, f"{which}.{field.name}", message)


def _tuning(file: str, kind: str, config: Mapping[str, Any]) -> Tuning:
    """Read the settings of a tuning; each must have the type and range of its field."""
    cls = TUNINGS[kind]
    new = {each.name: each.default for each in fields(cls) if each.metadata.get("is_new")}
    config = {**new, **config}
    _check_names(file, kind, config, [field.name for field in fields(cls)])
    values = {}
    for field in fields(cls):
        where, value = f"{kind}.{field.name}", config[field.name]
        if field.type is bool:
            if type(value) is not bool:
                raise StateInvalid(file, where, "not true or false")
        elif field.type is int:
            check_integer(file, where, value, field.metadata["low"], field.metadata["high"])
        else:
            value = _positive(file, where, value)
        values[field.name] = value
    tuning = cls(**values)
    if problem := tuning.problem():
        raise StateInvalid(file, kind, problem)
    return tuning


def _positive(file: str, where: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise StateInvalid(file, where, f"{short(value)} is no number above 0")
    try:
        return float(value)
    except OverflowError as error:
        raise StateInvalid(file, where, "out of range") from error


def check_integer(file: str, field: str, value: object, low: int, high: int) -> int:
    """Check that a value is a whole number in a range.

    Raises:
        StateInvalid: It is not.
    """
    # To Python a bool is an int, and conversions take 4.0 for 4.
    if type(value) is not int or not low <= value <= high:
        message = f"{short(value)} is no whole number in {low}..{high}"
        raise StateInvalid(file, field, message)
    return value


def _check_names(file: str, field: str, found: Mapping[str, Any], names: Collection[str]) -> None:
    prefix = f"{field}." if field else ""
    for name in names:
        if name not in found:
            raise StateInvalid(file, f"{prefix}{name}", "is missing", Reason.MISSING_FIELD)
    for name in found:
        if name not in names:
            raise StateInvalid(file, field, f"{short(name)} is not known")


# --- configurations that others read ------------------------------------------------------------


def check_peft_config(file: str, found: Mapping[str, Any], tuning: Tuning) -> None:
    """Check `adapter_config.json` against the tuning that it describes.

    PEFT reads the file on the machines of users. So a setting must be off unless its value is known
    to load no code, to name no modules by a pattern and to compute nothing else with the tensors.

    Raises:
        StateInvalid: It describes another adapter, or more than that.
    """
    wanted = tuning.config_entries
    for name in ("peft_type", "r", "rank_pattern"):
        if name not in found and (name in wanted or name == "peft_type"):
            raise StateInvalid(file, name, "is missing", Reason.MISSING_FIELD)
    for name, value in found.items():
        if name in wanted:
            if not _is_same(value, wanted[name]):
                message = f"{short(value)}, expected {short(wanted[name])}"
                raise StateInvalid(file, name, message)
        elif not (is_off(value) or (name in PEFT_VALUES and PEFT_VALUES[name](value))):
            where = name if _NAME.fullmatch(name) and len(name) <= 80 else ""
            shown = f"{short(value)}" if where else f"{short(name)}"
            raise StateInvalid(file, where, f"{shown} is not allowed here")


def _is_same(value: Any, wanted: Any) -> bool:
    """Whether a file has a number, or numbers by name; to Python `true` is 1, but not here."""
    if isinstance(wanted, Mapping):
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(_is_same(value[name], wanted[name]) for name in wanted)
        )
    return type(value) in (int, float) and value == wanted


def is_off(value: object) -> bool:
    """Whether a setting of PEFT's is off."""
    return value is None or value is False or value == [] or value == {}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= NAME_CHARACTERS_MAX


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= LIST_ENTRIES_MAX
        and all(isinstance(name, str) and is_name(name) for name in value)
    )


def is_name(name: str) -> bool:
    """Whether a text may name a module or a tensor."""
    return len(name) <= NAME_CHARACTERS_MAX and name.isascii() and bool(_NAME.fullmatch(name))


PEFT_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value == "CAUSAL_LM",
    "target_modules": _are_names,  # a text would be a pattern
    "target_parameters": _are_names,
    "bias": lambda value: value == "none",
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "inference_mode": lambda value: value is True,
    "init_lora_weights": lambda value: value is True or value == "gaussian",
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "peft_version": _is_text,
    "megatron_core": lambda value: value == "megatron.core",
    "qalora_group_size": lambda value: type(value) is int,
}
"""Values that settings of PEFT's may have besides off."""


def check_model_config(file: str, found: Mapping[str, Any]) -> None:
    """Check that the `config.json` of a full model asks nothing dangerous of its readers.

    Raises:
        StateInvalid: It names no type of model, asks for code, or has an impossible size.
    """
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or not is_name(model_type):
        raise StateInvalid(file, "model_type", "is no name", Reason.MISSING_FIELD)
    check_no_code(file, found)
    if not is_off(found.get("quantization_config")):
        raise StateInvalid(file, "quantization_config", "weights are not quantized here")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        if name in found:
            check_integer(file, name, found[name], 1, (1 << 31) - 1)


def check_text(file: str, content: io.BufferedIOBase, *, is_object: bool) -> None:
    """Refuse a text that is not UTF-8 or, with `is_object`, does not look like a JSON object.

    It reads pieces and parses nothing: a parsed vocabulary takes many times its bytes.

    Raises:
        StateInvalid: See above.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    first = last = ""
    try:
        while data := content.read(PIECE_BYTES):
            text = decoder.decode(data).strip()
            first, last = first or text[:1], text[-1:] or last
        decoder.decode(b"", final=True)
    except ValueError as error:
        raise StateInvalid(file, "", f"not UTF-8: {error}") from error
    if is_object and (first, last) != ("{", "}"):
        raise StateInvalid(file, "", "not a JSON object")


def check_no_code(file: str, found: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes transformers ask its user to run code.

    Raises:
        StateInvalid: It does.
    """
    for name in ("auto_map", "custom_pipelines", "trust_remote_code"):
        if not is_off(found.get(name)):
            raise StateInvalid(file, name, "nothing here brings code with it")
