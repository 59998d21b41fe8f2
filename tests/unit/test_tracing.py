"""Spans: made where somebody asks for them, part of the right call, and else nothing."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

import tinsmith.tracing
from tinsmithd import tracing
from tinsmithd.tracing.asked import is_asked

IDS = tracing.SpanIds(1, 2, 1)


@dataclass
class Recorded:
    """A span that a test made."""

    name: str
    parent: tracing.SpanIds | None
    ids: tracing.SpanIds
    links: Sequence[tracing.SpanIds] = ()
    said: dict[str, object] = field(default_factory=dict)
    failure: str | None = None

    def say(self, attributes: Mapping[str, object]) -> None:
        self.said.update(attributes)

    def rename(self, name: str) -> None:
        self.name = name

    def end(self, failure: str = "", end_ns: int = 0) -> None:
        self.failure = failure


class Recorder:
    """A tracer that keeps all spans."""

    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    def begin(self, name: str, parent: object, attributes: object, **more: object) -> Recorded:
        ids = tracing.SpanIds(1, 100 + len(self.spans), 1)
        made = Recorded(name, parent, ids, more.get("links", ()))  # type: ignore[arg-type]
        self.spans.append(made)
        return made

    def stop(self, within_s: float) -> None:
        pass


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    tracing.install(recorder)  # type: ignore[arg-type]
    yield recorder
    tracing.install(None)


def test_ids_go_to_another_process_and_back() -> None:
    assert tracing.read_traceparent(IDS.traceparent) == IDS._replace(remote=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        b"00",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'0' * 16}-01",
        f"01-{'1' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'1' * 16}-01-more",
        f"00-{'A' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'1' * 16}-01\n",
    ],
)
def test_what_is_no_traceparent_is_nobodys_span(text: object) -> None:
    assert tracing.read_traceparent(text) is None


@pytest.mark.parametrize("claim", ["", "a b", "x" * 65, "-a", "a\nb", "é"])
def test_a_claim_that_is_no_plain_name_is_ignored(claim: str) -> None:
    assert tracing.claimed("/s/M", [("x-request-id", claim)]).claim == ""
    assert tracing.claimed("/s/M", [("x-request-id", "mine")]).claim == "mine"


def test_nothing_is_made_where_nobody_asks() -> None:
    call = tracing.ServedCall("/s/M")
    with tracing.serving(call), tracing.span("a"):
        assert tracing.here() == tracing.Here(call, None)
        assert tracing.now_ns() == tracing.mark().since_ns == 0
        tracing.interval("b", 1)


def test_spans_are_parts_of_the_one_that_they_are_in(recorder: Recorder) -> None:
    call = tracing.ServedCall("/s/M", parent=IDS)
    with tracing.serving(call), tracing.served("call", {}), tracing.span("part"):
        tracing.interval("piece", 1)
        assert tracing.traceparent() == recorder.spans[1].ids.traceparent
    names = {span.ids: span.name for span in recorder.spans}
    assert [(span.name, names.get(span.parent, span.parent)) for span in recorder.spans] == [  # type: ignore[arg-type]
        ("call", IDS),
        ("part", "call"),
        ("piece", "part"),
    ]


def test_outside_a_call_there_are_none(recorder: Recorder) -> None:
    with tracing.span("part"):
        tracing.interval("piece", 1)
    assert recorder.spans == []


def test_a_span_says_of_an_error_its_reason_or_type(recorder: Recorder) -> None:
    class Refused(Exception):
        reason = "QUEUE_FULL"

    for error in (Refused("canary"), KeyError("canary")):
        with (
            pytest.raises(type(error)),
            tracing.serving(tracing.ServedCall("/s/M")),
            tracing.span("part"),
        ):
            raise error
    assert [span.failure for span in recorder.spans] == ["QUEUE_FULL", "KeyError"]


def test_a_batch_of_several_calls_has_links_to_each(recorder: Recorder) -> None:
    marks = []
    for number in range(2):
        with tracing.serving(tracing.ServedCall("/s/M")), tracing.span(f"call {number}"):
            marks.append(tracing.mark())
    tracing.batch("commit", "write", 1, [*marks, tracing.NOWHERE])
    made = recorder.spans[2:]
    assert [span.name for span in made] == ["write", "write", "commit"]
    assert set(made[2].links) == {span.ids for span in recorder.spans[:2]}
    tracing.batch("commit", "write", 1, marks[:1])
    assert [span.name for span in recorder.spans[5:]] == ["write"]


def test_work_for_another_call_is_that_calls(recorder: Recorder) -> None:
    """As a lane's runner, which was begun by some call, and works for each in turn."""
    with tracing.serving(tracing.ServedCall("/s/M", "one")):
        mark = tracing.mark()
    with tracing.serving(tracing.ServedCall("/s/M", "two")):
        with tracing.at(mark, waited="queue"):
            found = tracing.here()
            assert found is not None
            assert found.call.tenant == "one"
        assert tracing.logged()["tenant"] == "two"
    assert [span.name for span in recorder.spans] == ["queue"]


def test_calls_to_other_servers_say_for_which_call_they_are(recorder: Recorder) -> None:
    show = tracing.carried(lambda method: (("a", "b"),))
    assert show("/s/M") == (("a", "b"),)
    call = tracing.ServedCall("/s/M", parent=IDS)
    with tracing.serving(call):
        assert dict(show("/s/M")) == {
            "a": "b",
            "x-request-id": call.request_id,
            "traceparent": IDS.traceparent,
        }
        call.claim = "mine"
        assert dict(show("/s/M"))["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("endpoint", "env", "asked"),
    [
        ("", {}, False),
        ("http://c:4317", {}, True),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ("http://c:4317", {"OTEL_SDK_DISABLED": "true"}, False),
        ("http://c:4317", {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_spans_are_made_where_setting_or_environment_ask(
    endpoint: str, env: Mapping[str, str], asked: bool
) -> None:
    assert is_asked(endpoint, env) is asked


def test_who_does_not_ask_loads_no_opentelemetry() -> None:
    """Neither a client nor a server."""
    code = (
        "import sys, tinsmith, tinsmith.tracing;"
        "import tinsmithd.training.server, tinsmithd.gateway.server;"
        "assert tinsmith.tracing.of_program() is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_client_that_was_not_asked_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinsmith.tracing, "_said", False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tinsmith.tracing.of_program() is None
