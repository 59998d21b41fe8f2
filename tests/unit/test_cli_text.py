"""What a command shows of texts that others wrote, and how it fails."""

import contextlib
import io
import json
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tinsmith import errors
from tinsmith import v1 as pb
from tinsmith.cli import failures, records, text
from tinsmith.cli.failures import Failed, Failure, failure_of
from tinsmith.cli.output import Output

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/] :smile:\r\u202etxt.exe\x9b31m"


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def written(show: str, *values: object, terminal: bool = True, as_json: bool = False) -> str:
    """What a method of `Output` writes."""
    file = Terminal() if terminal else io.StringIO()
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        getattr(Output(as_json=as_json), show)(*values)
    return file.getvalue()


@pytest.mark.parametrize(
    ("show", "values"),
    [
        ("line", (HOSTILE,)),
        ("pieces", (HOSTILE,)),
        ("note", (HOSTILE,)),
        ("table", (["NAME"], [[HOSTILE], [(HOSTILE, "green")]])),
        ("pairs", ([(HOSTILE, HOSTILE)],)),
        ("fail", (Failure(HOSTILE, HOSTILE, 1, HOSTILE),)),
        ("json", ({HOSTILE: HOSTILE},)),
        ("json_line", ({HOSTILE: HOSTILE},)),
    ],
)
def test_no_text_moves_a_terminal(
    show: str, values: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it read as rich's markup or a name of an emoji; it stays to be read, escaped."""
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERM", "dumb")  # rich itself sends no codes then
    for terminal in (True, False):
        shown = written(show, *values, terminal=terminal)
        assert not [c for c in shown if c != "\n" and not c.isprintable()]
        assert "[bold red]x[/] :smile:" in shown
        assert "x1b[2J" in shown or "u001b[2J" in shown


def test_an_error_for_a_program_is_json() -> None:
    failure = Failure("no\nway", "go on", 4, "MODEL_NOT_FOUND", "model_id", "r1")
    document = json.loads(written("fail", failure, as_json=True))
    assert document["error"] == {
        "message": "no\nway",
        "hint": "go on",
        "status": 4,
        "reason": "MODEL_NOT_FOUND",
        "field": "model_id",
        "request_id": "r1",
    }


def test_numbers_that_json_lacks_are_words() -> None:
    shown = json.loads(written("json", {"a": [float("nan"), float("inf"), -float("inf"), 1.5]}))
    assert shown == {"a": ["NaN", "Infinity", "-Infinity", 1.5]}


def test_prose_keeps_its_lines() -> None:
    """And letters of all scripts; what changes their order is escaped."""
    assert text.prose("a\tb\nü 字 👩‍👩‍👧 \x00\u202e") == "a\tb\nü 字 👩‍👩‍👧 \\x00\\u202e"
    assert text.plain("a" * 400) == "a" * text.CHARACTERS_MAX + "..."


@pytest.mark.parametrize(
    ("typed", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("12h", 43200), ("2w", 1209600)]
)
def test_time_spans(typed: str, seconds: int) -> None:
    assert text.seconds_of(typed) == seconds


@pytest.mark.parametrize("typed", ["", "-1", "1y", "1.5h", "9" * 13, "\x1b[2J"])
def test_what_is_no_time_span_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="is no time span") as refusal:
        text.seconds_of(typed)
    assert str(refusal.value).isprintable()


def test_sizes_and_ages() -> None:
    assert [text.size(n) for n in (0, 999, 1000, 12_345_678, 2 * 10**12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "12.3 MB", "2.0 TB"
    ]  # fmt: skip
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert text.since("2026-01-01T23:59:48.000+00:00", now) == "12 s ago"
    assert text.since("2026-01-02T03:00:00+00:00", now) == "in 3 h"
    assert text.since(None, now) == ""


def test_a_server_may_say_anything_of_times_and_states() -> None:
    """What cannot be is left out, what is unknown is shown as its number."""
    assert records.moment_of(Timestamp(seconds=2**62)) is None
    model = pb.Model(state=99, last_request_time=Timestamp(seconds=-(2**60)))  # type: ignore[arg-type]
    record = records.model_record(model)
    assert (record["state"], record["last_request_time"]) == ("99", None)
    assert record["tuning"] == {"kind": "unknown"}


def test_each_kind_of_error_has_its_status() -> None:
    """And one that nobody answered says where, and what to do."""
    kinds = {
        errors.InvalidArgumentError("x", field="f"): failures.USAGE,
        errors.NotFoundError("x", reason="MODEL_NOT_FOUND"): failures.ABSENT,
        errors.AlreadyExistsError("x"): failures.STATE,
        errors.FailedPreconditionError("x"): failures.STATE,
        errors.ResourceExhaustedError("x"): failures.STATE,
        errors.AuthenticationError("x"): failures.FORBIDDEN,
        errors.PermissionDeniedError("x"): failures.FORBIDDEN,
        errors.DataLossError("x"): failures.WRONG,
        errors.InternalError("x", request_id="r1"): failures.WRONG,
        errors.UnavailableError("x"): failures.AWAY,
    }
    found = [failure_of(error, "h:1") for error in kinds]
    assert [failure.status for failure in found] == list(kinds.values())
    assert "tinsmith models ls" in found[1].hint
    assert "r1" in found[8].hint
    assert (found[9].message, "tinsmith up" in found[9].hint) == ("h:1 does not answer: x", True)


def test_progress_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and rate on a terminal; nothing anywhere else."""
    monkeypatch.setenv("COLUMNS", "100")
    for terminal, as_json in ((True, False), (True, True), (False, False)):
        file = Terminal() if terminal else io.StringIO()
        with contextlib.redirect_stderr(file), Output(as_json=as_json).progress("fetching") as tell:
            tell(50_000, 100_000)
        shown = file.getvalue()
        if terminal and not as_json:
            assert "fetching" in shown
            assert "50.0/100.0 kB" in shown
        else:
            assert shown == ""


def test_nobody_is_asked_who_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be undone needs a yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(Failed) as refusal:
        Output(as_json=False).confirm("Delete it?", yes=False)
    assert refusal.value.failure.status == failures.USAGE
    Output(as_json=False).confirm("Delete it?", yes=True)
    for answer, goes_on in (("y\n", True), ("\n", False), ("no\n", False), ("", False)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        with (
            contextlib.nullcontext() if goes_on else pytest.raises(Failed, match="nothing was done")
        ):
            Output(as_json=False).confirm("Delete it?", yes=False)
