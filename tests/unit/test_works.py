"""Calls and answers are read as they were written."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tinsmithd import errors
from tinsmithd.domain import AdamParams, CheckpointKind, CheckpointPath
from tinsmithd.errors import InvalidArgument, Reason, TinsmithError
from tinsmithd.training.call import work as works
from tinsmithd.training.call.work import ComputeWork, Outcome, Work

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
    st.builds(works.StepWork, st.builds(AdamParams, *[numbers] * 6)),
    st.builds(
        works.SaveWork,
        st.builds(works.SaveOptions, paths, st.none() | st.integers(1), st.booleans(), notes),
    ),
    st.builds(works.LoadWork, paths, st.booleans()),
)


def same(found: TinsmithError | None, error: TinsmithError) -> bool:
    """Class, words and all fields."""
    said = (type(found), str(found), vars(found))
    return said == (type(error), str(error), vars(error))


@given(asked)
def test_a_call_is_read_as_it_was_written(asking: Work) -> None:
    """All kinds of calls survive being written down."""
    assert works.decode(works.encode(asking)) == asking


@given(blobs, values)
def test_an_answer_is_read_as_it_was_written(parts: list[bytes], value: dict[str, Any]) -> None:
    """Parts and value survive, and equal answers give equal bytes."""
    written_down = works.encode_outcome(Outcome(parts, value))
    assert works.decode_outcome(written_down) == Outcome(parts, value)
    turned = dict(reversed(value.items()))
    assert works.encode_outcome(Outcome(tuple(parts), turned)) == written_down


@given(refusals)
def test_a_refusal_is_read_as_it_was_written(error: TinsmithError) -> None:
    """Class, message, reason, field, wait and metadata survive, as a call and as an answer."""
    refused = works.decode(works.encode(works.RefusedWork(error)))
    assert isinstance(refused, works.RefusedWork)
    assert same(refused.error, error)
    assert same(works.decode_outcome(works.encode_outcome(Outcome(error=error))).error, error)
