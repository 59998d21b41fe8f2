"""Lines of a log as JSON: one object each, of bounded size, with nothing that a caller wrote."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.errors import InvalidArgumentError
from tinsmithd import errors, tracing
from tinsmithd.domain import CheckpointKind, CheckpointPath
from tinsmithd.owners import inner_id, logged_id
from tinsmithd.processes import EXIT_HOPELESS, logs
from tinsmithd.processes.json_lines import LINE_BYTES_MAX, JsonFormatter
from tinsmithd.text import tag, without_quoted

CANARY = "canary-4711"
TEXTS = st.text(st.characters(), max_size=3000)


def formatted(message: object, *args: object, error: BaseException | None = None) -> dict[str, Any]:
    """One event as JSON has it."""
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("a.logger", logging.ERROR, "", 0, message, args, info)
    line = JsonFormatter("training").format(record)
    assert "\n" not in line
    assert len(line.encode()) < LINE_BYTES_MAX
    found: dict[str, Any] = json.loads(line)
    return found


def raised(error: BaseException, depth: int = 0) -> BaseException:
    """An error that came through some functions."""
    try:
        if depth:
            raise raised(error, depth - 1)
        raise error
    except BaseException as found:
        return found


@given(TEXTS)
def test_any_text_is_one_line_of_bounded_size(text: str) -> None:
    found = formatted("%s", text, error=raised(ValueError(text)))
    kept = found["message"].removesuffix("... [cut]")
    assert text.startswith(kept) or not text.isprintable()
    assert found["error_type"] == "ValueError"


def test_a_line_says_when_how_bad_and_who() -> None:
    found = formatted("%d models", 3)
    assert datetime.fromisoformat(found["time"]).utcoffset() is not None
    assert found["time"].endswith("Z")
    assert len(found["time"].partition(".")[2]) == len("123Z")
    wanted = {"level": "ERROR", "process": "training", "logger": "a.logger", "message": "3 models"}
    assert {key: found[key] for key in wanted} == wanted
    assert set(found) == {"time", *wanted}


def test_a_long_traceback_keeps_both_of_its_ends() -> None:
    found = formatted("failed", error=raised(KeyError("x"), depth=200))
    frames = found["traceback"]
    assert any(frame.startswith("... ") for frame in frames)
    assert frames[0].endswith(" raised")
    assert frames[-1].endswith(" raised")
    assert found["error"] == "'x'"


def test_an_error_is_shown_with_what_it_came_of() -> None:
    try:
        try:
            raise OSError("no disk")
        except OSError as cause:
            raise errors.Internal from cause
    except errors.Internal as error:
        found = formatted("failed", error=error)
    assert "OSError, and of that came" in found["traceback"]
    assert found["error_type"] == "Internal"


def test_a_line_of_a_call_has_its_id_tenant_and_trace() -> None:
    parent = tracing.read_traceparent(f"00-{'a' * 32}-{'b' * 16}-01")
    call = tracing.ServedCall("/s/M", "alice", claim="mine", parent=parent)
    with tracing.serving(call):
        found = formatted("said")
    assert found["request_id"] == call.request_id
    assert (found["tenant"], found["method"]) == ("alice", "/s/M")
    assert found["caller_request_id"] == "mine"
    assert (found["trace_id"], found["span_id"]) == ("a" * 32, "b" * 16)
    assert "request_id" not in formatted("said")


async def test_a_task_says_for_whose_call_it_works_until_it_says_otherwise() -> None:
    said = []

    async def work(*, forgets: bool) -> None:
        if forgets:
            tracing.forget()
        await asyncio.sleep(0)
        said.append(formatted("said").get("tenant"))

    with tracing.serving(tracing.ServedCall("/s/M", "alice")):
        await asyncio.gather(work(forgets=False), work(forgets=True))
    assert said == ["alice", None]


def test_what_callers_wrote_is_in_no_message() -> None:
    """Names stand as tags, refusals as reasons, and of other errors quotes are left out."""
    path = CheckpointPath(inner_id("alice", CANARY), CheckpointKind.TRAINING, CANARY)
    refusals: list[BaseException] = [
        errors.InvalidArgument(f'data[3].x["{CANARY}"]', f"is {CANARY}"),
        errors.NotFound(f"no model {CANARY!r}", errors.Reason.MODEL_NOT_FOUND),
        errors.DataLoss(f"{path} is gone", errors.Reason.CHECKPOINT_CORRUPT),
        errors.Unavailable(f"'{CANARY}'", errors.Reason.SHUTTING_DOWN, retry_after_s=1.0),
        InvalidArgumentError(CANARY, reason="INVALID_FIELD", field=CANARY),
    ]
    with tracing.serving(tracing.ServedCall("/s/M", "alice")):
        for value in [*refusals, path, KeyError(CANARY), ValueError(f"x: '{CANARY}' is \"y\"")]:
            assert CANARY not in json.dumps(formatted("said %s", value))
            if isinstance(value, BaseException):
                assert CANARY not in json.dumps(formatted("failed", error=raised(value)))
    assert formatted("%s", refusals[0])["message"] == 'INVALID_FIELD at data[3].x["..."]'
    assert formatted("%s", path)["message"].count(tag(CANARY)) == 2


def test_a_name_has_the_tag_that_a_shell_makes_of_it() -> None:
    """`printf %s canary-4711 | b2sum -l 32`."""
    assert tag(CANARY) == "~e5157a49"
    drawn = "0123456789abcdef" * 2
    assert logged_id(inner_id("alice", drawn)) == f"alice/{drawn}"
    assert logged_id(inner_id("alice", CANARY)) == f"alice/{tag(CANARY)}"
    assert logged_id(CANARY) == tag(CANARY)


def test_of_a_text_goes_all_between_the_first_quote_and_the_last() -> None:
    assert without_quoted("a 'b' c \"d' e\" f") == "a '...' f"
    assert without_quoted("nothing to hide") == "nothing to hide"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, logging.Logger]]:
    """The end of a pipe that nobody reads, and a logger that writes JSON to the other."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            handler = logs.StderrHandler()
        handler.setFormatter(JsonFormatter("training"))
        logger = logging.Logger("test")
        logger.addHandler(handler)
        yield reading, logger
    os.close(reading)


def test_a_full_pipe_gets_whole_lines_or_none(pipe: tuple[int, logging.Logger]) -> None:
    """Once it is read, the next line says how many it lacks."""
    reading, logger = pipe
    for number in range(200):
        logger.error("x" * (number * 17 % 3000))
    taken = os.read(reading, 1 << 20)
    logger.error("again")
    os.set_blocking(reading, False)
    lines = (taken + os.read(reading, 1 << 20)).splitlines()
    found = [json.loads(line) for line in lines]
    assert found[-1]["message"] == "again"
    assert found[-1]["dropped_events"] == 200 - (len(found) - 1)


@pytest.mark.parametrize("wrong", ["--listen-address=x", "--otlp-endpoint=ftp://x"])
def test_what_ends_a_process_at_its_start_is_a_line_of_json_too(wrong: str) -> None:
    program = [sys.executable, "-m", "tinsmithd.checkpoint", "--log-format=json", wrong]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HOPELESS
    (line,) = done.stderr.splitlines()
    event = json.loads(line)
    assert (event["level"], event["process"]) == ("CRITICAL", "checkpoint")
    assert wrong.partition("=")[0] in event["message"]
