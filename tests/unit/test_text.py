"""Text of somebody else's is escaped and cut before it is repeated."""

import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmithd import errors
from tinsmithd.processes import logs
from tinsmithd.rpc.status import to_status
from tinsmithd.text import bounded

TEXTS = st.text(st.characters(), max_size=400)


@given(TEXTS, st.integers(16, 300))
def test_bounded_text_is_printable_short_and_stays_as_it_is(text: str, most: int) -> None:
    once = bounded(text, most)
    assert len(once.encode()) <= most
    assert once.isprintable()
    assert bounded(once, most) == once


def test_what_needs_nothing_is_not_touched() -> None:
    for text in ("", 'data[3].loss_fn_inputs["weights"]: shape [12], expected [13]', "Ünïcödé"):
        assert bounded(text, 100) == text


@pytest.mark.parametrize("character", ["%", "\n", "é", "中", "\U0001f600", "\ud800", "x"])
def test_an_error_with_any_text_fits_into_trailers(character: str) -> None:
    """grpc-status-details-bin in base64 and grpc-message with its escapes are below 8 KiB."""
    text = character * 100_000
    error = errors.InvalidArgument(text, text, metadata={text + str(i): text for i in range(99)})
    error.field = text
    status = to_status(error, "0" * 16)
    message = status.message.encode()
    escaped = sum(1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3 for byte in message)
    assert len(status.SerializeToString()) * 4 / 3 + escaped < 8 * 1024


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """The end of a pipe that nobody reads, and the other one, to be standard error."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        yield reading, file
    os.close(reading)


def logger_to(stderr: TextIO, monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        handler = logs.StderrHandler()
    handler.setFormatter(logs.LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def test_a_log_that_nobody_reads_holds_up_nobody(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full pipe takes no more; once it is read, the log says how much it lacks."""
    reading, writing = pipe
    logger = logger_to(writing, monkeypatch)
    for _ in range(200):
        logger.error("x" * 3000)
    os.read(reading, 10_000)
    logger.error("again")
    os.set_blocking(reading, False)
    rest = os.read(reading, 1 << 20)
    assert b"events were dropped" in rest
    assert rest.endswith(b"ERROR again\n")


def test_neither_message_nor_traceback_makes_a_line_that_looks_like_an_event(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = pipe
    logger = logger_to(writing, monkeypatch)
    try:
        raise ValueError("told\nERROR forged\n" + "y" * 100_000)
    except ValueError:
        logger.exception("said\nERROR forged %s", "z" * 100_000)
    lines = os.read(reading, 1 << 20).decode().splitlines()
    assert sum(line.startswith("ERROR") for line in lines) == 1
    assert all(line.startswith("  | ") for line in lines[1:])
    assert max(map(len, lines)) < 4200
