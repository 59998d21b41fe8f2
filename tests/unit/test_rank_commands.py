"""What a rank does with a command, on an engine that only pretends."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import to_files
from data import datum_to_pb
from engines import only
from tinsmith import tensors
from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.v1.training_service_pb2 import DatumOutput
from tinsmithd.convert import types as convert
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, LoraConfig, ModelState, Tuning
from tinsmithd.errors import Internal, InvalidArgument
from tinsmithd.state import files as state_files
from tinsmithd.state.tensors import MOMENTS
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.interface import (
    Batch,
    CompositionMismatch,
    ForwardResult,
    ModelBroken,
    OnOutput,
)
from tinsmithd.trainer.state_sender import COPIES_MAX, PIECE_BYTES_MAX
from wire import error_in

LORA = LoraConfig(rank=2)
BREAKING_STEP = pb.AttachResponse(
    command_id=7,
    model_id="m",
    optim_step=pb.OptimStep(adam_params=convert.adam_to_pb(AdamParams(learning_rate=666))),
)


class Pretender:
    """An engine that computes nothing.

    Attributes:
        batches: What it was asked to compute.
        value: In all its weights.
        deleted: Models that it was told to drop.
    """

    info: Any = None
    identity: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.value = 1.0
        self.copies_count = 0
        self.deleted: list[str] = []

    def create_model(self, model_id: str, tuning: Tuning) -> None: ...

    def delete_model(self, model_id: str) -> None:
        self.deleted.append(model_id)

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        if batch.composition == b"of another call":
            raise CompositionMismatch("it does not fit")
        self.batches.append(batch)
        for index, datum in enumerate(batch.data):
            on_output(index, {"logprobs": np.full(len(datum.tokens), index, np.float32)})
        return ForwardResult({"loss:sum": 2.5}, b"as composed", non_finite=batch.backward)

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        if adam.learning_rate == 666:
            raise ModelBroken("half-way")
        self.value += 1
        return {"step:last": self.value}

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        if model_id == "absent":
            raise KeyError(model_id)
        self.copies_count += 1
        weights = {"w.lora_A.weight": np.full((2, 1_500_000), self.value, np.float32)}
        weights["w.lora_B.weight"] = np.full((3, 2), self.value, np.float32)
        moments = {f"{kind}.{n}": a for n, a in weights.items() for kind in MOMENTS}
        config = {"peft_type": "LORA", "r": 2}
        return ModelState(LORA, weights, moments if optimizer else {}, int(self.value), config)


@pytest.fixture
def engine() -> Pretender:
    return Pretender()


def commands_on(engine: Pretender, **settings: Any) -> Commands:
    """What carries out commands on model "m"."""
    engines = only(engine)
    engines.create_model("m", LORA)
    return Commands(engines, **settings)


def compute(composition: bytes = b"", *, backward: bool = True) -> pb.AttachResponse:
    """Two data of three tokens."""
    datum = Datum(np.arange(3), {"target_tokens": np.arange(3), "weights": np.ones(3, np.float32)})
    message = pb.Compute(
        loss_fn=convert.loss_fn_to_pb(CrossEntropy()),
        data=[datum_to_pb(datum).SerializeToString()] * 2,
        backward=backward,
        composition=composition,
    )
    return pb.AttachResponse(command_id=7, model_id="m", compute=message)


def snapshot(command_id: int, model_id: str = "m", *, optimizer: bool = True) -> pb.AttachResponse:
    copying = pb.CopyState(optimizer=optimizer)
    return pb.AttachResponse(command_id=command_id, model_id=model_id, copy_state=copying)


def test_a_compute_answers_with_its_composition_and_what_it_took(engine: Pretender) -> None:
    """Outputs per datum first; data come as bytes, and the composition goes to the engine."""
    answers: list[pb.AttachRequest] = []
    commands_on(engine, world_size=1).apply(compute(b"so"), answers.append)
    *outputs, last = answers
    assert [a.command_id for a in answers] == [7] * len(answers)
    batch = engine.batches[0]
    assert batch.composition == b"so"
    assert [datum.tokens.tolist() for datum in batch.data] == [[0, 1, 2]] * 2
    read = [DatumOutput.FromString(answer.outputs.outputs[0]) for answer in outputs]
    found = [tensors.decode(output.loss_fn_outputs["logprobs"]) for output in read]
    np.testing.assert_array_equal(found, [[0, 0, 0], [1, 1, 1]])
    assert dict(last.done.metrics) == {"loss:sum": 2.5}
    assert (last.done.composition, last.done.non_finite) == (b"as composed", True)
    assert 0 < last.done.engine_s < 10
    commands_on(engine, world_size=1).apply(compute(backward=False), answers.append)
    assert not answers[-1].done.non_finite


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_composition_that_does_not_fit_is_a_refusal(engine: Pretender, ranks: int) -> None:
    """All ranks see it alike, so it does not end the group."""
    answers: list[pb.AttachRequest] = []
    commands_on(engine, world_size=ranks).apply(compute(b"of another call"), answers.append)
    (answer,) = answers
    error = error_in(answer.failed)
    assert (type(error), error.field) == (InvalidArgument, "composition")
    assert "it does not fit" in error.message


def test_a_model_that_breaks_is_dropped_and_said_to_be(engine: Pretender) -> None:
    """Its state is half changed; the Training server brings it back."""
    answers: list[pb.AttachRequest] = []
    commands_on(engine, world_size=1).apply(BREAKING_STEP, answers.append)
    (answer,) = answers
    assert (answer.failed.model_broken, answer.failed.status) == ("half-way", b"")
    assert engine.deleted == ["m"]


def test_a_model_that_breaks_on_one_of_several_ranks_ends_the_group(engine: Pretender) -> None:
    """The others may wait for this one in the middle of the step."""
    answers: list[pb.AttachRequest] = []
    with pytest.raises(ModelBroken):
        commands_on(engine, world_size=2).apply(BREAKING_STEP, answers.append)
    assert answers == []


@pytest.mark.parametrize("lost", [True, False])
def test_a_rank_whose_device_is_lost_ends_although_it_is_alone(
    engine: Pretender, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """No later call could succeed; after any other error one could."""
    text = "an illegal memory access was encountered" if lost else "invalid configuration argument"

    def fail(*_: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {text}")

    monkeypatch.setattr(engine, "optim_step", fail)
    answers: list[pb.AttachRequest] = []
    ends = pytest.raises(torch.AcceleratorError) if lost else contextlib.nullcontext()
    with ends:
        commands_on(engine, world_size=1).apply(BREAKING_STEP, answers.append)
    assert [type(error_in(answer.failed)) for answer in answers] == ([] if lost else [Internal])


class Later:
    """Takes what has time, as fast as a test allows.

    Attributes:
        messages: What came.
        open: Whether the stream is.
    """

    def __init__(self) -> None:
        self.messages: list[pb.AttachRequest] = []
        self.go = threading.Event()
        self.open = True
        self.ended = threading.Event()

    def __call__(self, message: pb.AttachRequest) -> bool:
        assert self.go.wait(10)
        if not self.open:
            self.ended.set()
            return False
        self.messages.append(message)
        if message.WhichOneof("content") in ("done", "failed"):
            self.ended.set()
        return True

    def wait(self) -> None:
        assert self.ended.wait(10)


def files_of(messages: Sequence[pb.AttachRequest]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for message in messages:
        assert len(message.piece.data) <= PIECE_BYTES_MAX
        name = message.piece.file_name
        files[name] = files.get(name, b"") + message.piece.data
    return files


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_snapshot_is_what_the_model_was_when_it_was_copied(
    engine: Pretender, optimizer: bool
) -> None:
    """`copied` at once; the pieces and `done` later, whatever is answered in between."""
    commands, later, answers = commands_on(engine, world_size=1), Later(), list[pb.AttachRequest]()
    expected = to_files(engine.export_state("m", optimizer=optimizer))
    commands.apply(snapshot(1, optimizer=optimizer), answers.append, later)
    assert answers == [pb.AttachRequest(command_id=1, copied=pb.Copied())]
    step = pb.AttachResponse(command_id=2, model_id="m", optim_step=pb.OptimStep())
    commands.apply(step, answers.append, later)
    assert answers[-1].done.metrics["step:last"] == 2
    later.go.set()
    later.wait()
    *pieces, last = later.messages
    assert {message.command_id for message in later.messages} == {1}
    assert last.done.step_count == 1
    assert last.done.lora_config.rank == 2
    assert files_of(pieces) == expected


def test_few_copies_are_held_at_once(engine: Pretender) -> None:
    """One more is not even made before there is room for it."""
    commands, later, answers = commands_on(engine, world_size=1), Later(), list[pb.AttachRequest]()
    for command_id in range(COPIES_MAX):
        commands.apply(snapshot(command_id + 1), answers.append, later)
    one_more = threading.Thread(
        target=commands.apply, args=(snapshot(COPIES_MAX + 1), answers.append, later)
    )
    one_more.start()
    one_more.join(0.2)
    assert one_more.is_alive()
    assert (engine.copies_count, len(answers)) == (COPIES_MAX, COPIES_MAX)
    later.go.set()
    one_more.join(10)
    assert (engine.copies_count, len(answers)) == (COPIES_MAX + 1, COPIES_MAX + 1)


def test_a_stream_that_ended_gives_its_copies_back(engine: Pretender) -> None:
    """And the snapshots of the stream after it are taken."""
    commands, later, answers = commands_on(engine, world_size=1), Later(), list[pb.AttachRequest]()
    for command_id in range(COPIES_MAX):
        commands.apply(snapshot(command_id + 1), answers.append, later)
    later.open = False
    later.go.set()
    again = Later()
    again.go.set()
    commands.apply(snapshot(9), answers.append, again)
    again.wait()
    assert again.messages[-1].done.step_count == 1
    assert later.messages == []


def test_a_snapshot_that_fails_says_so(engine: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be copied, in place of `copied`; where it cannot be written, later."""
    commands, later, answers = commands_on(engine, world_size=1), Later(), list[pb.AttachRequest]()
    later.go.set()
    commands.apply(snapshot(1, "absent"), answers.append, later)
    assert type(error_in(answers[-1].failed)) is Internal

    def break_off(state: ModelState, bytes_max: int) -> Any:
        yield "f", b"1"
        raise RuntimeError("no")

    monkeypatch.setattr(state_files, "to_pieces", break_off)
    commands.apply(snapshot(2), answers.append, later)
    assert answers[-1].HasField("copied")
    later.wait()
    assert [m.WhichOneof("content") for m in later.messages] == ["piece", "failed"]
    assert type(error_in(later.messages[-1].failed)) is Internal
    monkeypatch.undo()
    later.ended.clear()
    for command_id in range(3, 3 + COPIES_MAX):
        commands.apply(snapshot(command_id), answers.append, later)
    later.wait()


def test_only_rank_0_answers(engine: Pretender) -> None:
    """The others make the copy, which the ranks do together, and nothing of it."""
    answers: list[pb.AttachRequest] = []
    other: Callable[..., None] = commands_on(engine, world_size=2, rank=1).apply
    other(snapshot(1), answers.append)
    assert (engine.copies_count, answers) == (1, [])


def test_a_state_comes_in_as_pieces(engine: Pretender) -> None:
    """What was exported is imported; the bytes are joined in order, and never copied again."""
    taken: list[ModelState] = []
    engine.import_state = lambda _, state, *, optimizer: taken.append(state)  # type: ignore[attr-defined]
    commands, answers = commands_on(engine, world_size=1), list[pb.AttachRequest]()
    later = Later()
    later.go.set()
    commands.apply(snapshot(1), answers.append, later)
    later.wait()
    *pieces, done = later.messages
    assert done.done.step_count == 1
    for message in pieces:
        commands.apply(pb.AttachResponse(command_id=2, piece=message.piece), answers.append)
    held = {name: np.frombuffer(content, np.uint8) for name, content in commands._pieces.items()}
    command = pb.ImportState(optimizer=True, create=True)
    commands.apply(pb.AttachResponse(command_id=2, import_state=command), answers.append)
    assert answers[-1].done.step_count == 1
    assert {name: array.shape for name, array in taken[0].weights.items()} == {
        "w.lora_A.weight": (2, 1_500_000),
        "w.lora_B.weight": (3, 2),
    }
    for array in (*taken[0].weights.values(), *taken[0].optimizer.values()):
        assert any(np.shares_memory(array, content) for content in held.values())
    assert all((array == 1).all() for array in taken[0].weights.values())
