"""Calls and answers are read as they were written."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tinsmithd import errors
from tinsmithd.domain import AdamParams, CheckpointKind, CheckpointPath
from tinsmithd.errors import InvalidArgument, Reason, TinsmithError
from tinsmithd.saves import SaveOptions
from tinsmithd.training.call import (
    CallKind,
    ComputeWork,
    LoadWork,
    RefusedWork,
    SaveWork,
    StepWork,
    StoredAnswer,
    Work,
    answer_digest,
    decode_answer,
    decode_work,
    encode_answer,
    encode_work,
)

names = st.text("abcXYZ019", min_size=1, max_size=8)
paths = st.builds(CheckpointPath, names, st.sampled_from(CheckpointKind), names)
numbers = st.floats(allow_nan=False)
blobs = st.lists(st.binary(max_size=40), max_size=4)
notes = st.dictionaries(st.text(), st.text(), max_size=3)
values = st.dictionaries(st.text(), st.one_of(numbers, st.text(), st.none(), notes), max_size=3)
kinds = st.sampled_from(
    [getattr(errors, each.__name__) for each in TinsmithError.__subclasses__()]
).filter(lambda kind: kind not in (InvalidArgument, errors.Internal))
refusals = st.one_of(
    st.builds(
        lambda kind, *args, **more: kind(*args, **more),
        *(kinds, st.text(), st.sampled_from(Reason)),
        field=st.text(),
        retry_after_s=st.none() | numbers,
        metadata=notes,
    ),
    st.builds(InvalidArgument, st.text(), st.text(), st.sampled_from(Reason), metadata=notes),
    st.builds(errors.Internal, st.text()),
)
asked = st.one_of(
    st.builds(ComputeWork, st.binary(), blobs, st.lists(st.integers(0)), st.booleans()),
    st.builds(StepWork, st.builds(AdamParams, *[numbers] * 6)),
    st.builds(
        SaveWork,
        st.builds(SaveOptions, paths, st.none() | st.integers(1), st.booleans(), notes),
    ),
    st.builds(LoadWork, paths, st.booleans()),
)


def same(found: TinsmithError | None, error: TinsmithError) -> bool:
    """Class, words and all fields."""
    said = (type(found), str(found), vars(found))
    return said == (type(error), str(error), vars(error))


@given(asked)
def test_a_call_is_read_as_it_was_written(asking: Work) -> None:
    """All kinds of calls survive being written down."""
    assert decode_work(encode_work(asking)) == asking


@given(blobs, values)
def test_an_answer_is_read_as_it_was_written(outputs: list[bytes], value: dict[str, Any]) -> None:
    """Outputs and value survive, and equal answers give equal bytes."""
    written_down = encode_answer(StoredAnswer(outputs, value))
    assert decode_answer(written_down) == StoredAnswer(outputs, value)
    turned = dict(reversed(value.items()))
    assert encode_answer(StoredAnswer(tuple(outputs), turned)) == written_down


@given(refusals)
def test_a_refusal_is_read_as_it_was_written(error: TinsmithError) -> None:
    """Class, message, reason, field, wait and metadata survive, as a call and as an answer."""
    refused = decode_work(encode_work(RefusedWork(error)))
    assert isinstance(refused, RefusedWork)
    assert same(refused.error, error)
    assert same(decode_answer(encode_answer(StoredAnswer(error=error))).error, error)


def test_an_answer_says_its_calls_kind_and_one_of_an_older_release_none() -> None:
    """The kind is no part of what a replay must give again; answers without one still open."""
    value = {"metrics": {"loss:sum": 1.5}}
    old = StoredAnswer([b"ab", b"c"], value)
    head = b'{"kind":"value","sizes":[2,1],"value":{"metrics":{"loss:sum":1.5}}}'
    assert encode_answer(old) == len(head).to_bytes(4, "little") + head + b"abc"
    assert decode_answer(encode_answer(old)).kind is None
    for kind in CallKind:
        new = StoredAnswer([b"ab", b"c"], value, kind=kind)
        assert decode_answer(encode_answer(new)) == new
        assert answer_digest(new) == answer_digest(old)
