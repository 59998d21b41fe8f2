"""Several models on one rank group, some much heavier than others.

Who ran when is read off the commands that rank 0 carried out, or off the order in which answers
came; never off a clock.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from clusters import RunningCluster
from data import datum_to_pb, make_data
from engines import make_engine
from faults.processes import hung
from recorded_cluster import (
    ADAM,
    CROSS_ENTROPY,
    data_of,
    forward_backward,
    recorded_cluster,
    token_count,
)
from tinsmith import tensors
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tinsmith.internal.v1 import trainer_link_service_pb2 as link_pb
from tinsmith.v1 import types_pb2
from tinsmithd.convert import types as convert
from tinsmithd.domain import Datum, LoraConfig
from tinsmithd.errors import Reason, ResourceExhausted
from tinsmithd.modeling.base import load_base
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.interface import Batch, ForwardResult, OnOutput
from tinsmithd.trainer.engines.reference import ReferenceEngine
from wire import error_in, reason_and_field

QUANTUM_TOKENS = 64
UNLUCKY_TOKEN = 299

torch.set_num_threads(1)


# --- what rank 0 carries out ------------------------------------------------------------------


class RunsOutOnce(ReferenceEngine):
    """Runs out of memory, once, at the first call that has `UNLUCKY_TOKEN` in it."""

    failed = False

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        if not self.failed and any(UNLUCKY_TOKEN in datum.tokens for datum in batch.data):
            self.failed = True
            raise ResourceExhausted("no memory is left", Reason.OUT_OF_MEMORY)
        return super().forward(batch, on_output)


def reference(folder: Path) -> ReferenceEngine:
    return ReferenceEngine(load_base(str(folder), dtype="float32", on_progress=lambda _: None))


async def test_models_that_wait_are_given_the_same_tokens(tiny_model: Path) -> None:
    """One sends calls of 12 data, one calls of one long datum, one many small calls: as long as
    all of them wait, any two differ by at most their largest turns together."""
    work = {
        "large": [data_of(1, 12, 30)] * 2,
        "long": [data_of(2, 1, 100)] * 7,
        "small": [data_of(3, 1, 10)] * 70,
    }
    async with recorded_cluster(reference(tiny_model), QUANTUM_TOKENS) as recorded:
        ids = {name: await recorded.create() for name in work}
        await recorded.queued(*((ids[name], calls) for name, calls in work.items()))
        computed = recorded.rank.computed()
    names = {model_id: name for name, model_id in ids.items()}
    turns = Counter(names[model_id] for model_id, _ in computed)
    assert turns == {"large": 12, "long": 7, "small": 70}
    largest = {"large": 60, "long": 100, "small": 10}
    used: Counter[str] = Counter()
    left = turns.copy()
    for model_id, tokens in computed:
        used[names[model_id]] += tokens
        left[names[model_id]] -= 1
        if not left[names[model_id]]:
            break
        for a in work:
            for b in work:
                assert used[a] - used[b] <= largest[a] + largest[b]
    assert sum(used.values()) > 0.8 * sum(tokens for _, tokens in computed)
    squares = sum(value**2 for value in used.values())
    assert sum(used.values()) ** 2 / (len(used) * squares) > 0.98  # Jain's index


async def test_a_call_is_cut_by_its_own_data_alone(tiny_model: Path) -> None:
    """The same parts whoever else is there; a call of one part leaves no savepoint."""
    whole, cut = data_of(1, 2, 32), [*data_of(2, 3, 30), *data_of(3, 1, 100), *data_of(4, 2, 30)]
    async with recorded_cluster(reference(tiny_model), QUANTUM_TOKENS) as recorded:
        alone, beside, busy = [await recorded.create() for _ in range(3)]
        await recorded.queued((alone, [whole, cut]))
        await recorded.queued((busy, [data_of(5, 20, 30)] * 3), (beside, [whole, cut]))
    for model_id in (alone, beside):
        computes = [compute for found, compute in recorded.rank.computes if found == model_id]
        assert [token_count(c.data) for c in computes] == [64, 60, 30, 100, 60]
        assert [c.place for c in computes] == [
            link_pb.BATCH_PLACE_UNSPECIFIED,
            link_pb.BATCH_PLACE_FIRST,
            *[link_pb.BATCH_PLACE_LATER] * 3,
        ]


async def test_a_light_model_waits_for_one_part_of_each_heavy_one(tiny_model: Path) -> None:
    """However long their calls are: behind the part under way comes at most one of each."""
    async with recorded_cluster(reference(tiny_model), QUANTUM_TOKENS) as recorded:
        heavy = [await recorded.create() for _ in range(3)]
        light = await recorded.create()
        work = [(model_id, [data_of(1, 60, 30)] * 2) for model_id in heavy]
        calls = asyncio.create_task(recorded.queued(*work))
        await recorded.until_computed(10)
        for seq_id in range(1, 6):
            recorded.rank.go.clear()
            call = asyncio.create_task(recorded.compute(light, seq_id, data_of(seq_id, 1, 10)))
            await recorded.until_next(light, seq_id + 1)
            before = len(recorded.rank.computes)
            recorded.rank.go.set()
            await call
            waited_for = [model_id for model_id, _ in recorded.rank.computes[before:]]
            waited_for = waited_for[: waited_for.index(light)]
            assert len(waited_for) <= 1 + len(heavy)
            assert all(count <= 1 for count in Counter(waited_for[1:]).values())
        assert not calls.done()
        assert len(await calls) == 6
        assert len(recorded.rank.computes) == 6 * 30 + 5


async def test_a_part_that_fails_takes_back_those_before_it(tiny_model: Path) -> None:
    """RESOURCE_EXHAUSTED in the third of four parts: the number is free, nothing was added, and
    what waited before still waits; sent again, the call does what it would have done."""
    data = [data_of(1, 3, 10), data_of(2, 8, 30)]
    data[1][5].model_input.chunks[0].tokens.CopyFrom(tensors.encode([UNLUCKY_TOKEN] * 30))
    engine = RunsOutOnce(load_base(str(tiny_model), dtype="float32", on_progress=lambda _: None))
    async with recorded_cluster(engine, QUANTUM_TOKENS) as recorded:
        recorded.rank.go.set()
        models = [await recorded.create() for _ in range(3)]
        first = await recorded.compute(models[0], 1, data[0])
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await recorded.compute(models[0], 2, data[1])
        assert reason_and_field(failure.value)[0] == "OUT_OF_MEMORY"
        assert len(recorded.rank.computes) == 1 + 3
        second = await recorded.compute(models[0], 2, data[1])
        assert first == await recorded.compute(models[1], 1, data[0])
        assert second == await recorded.compute(models[1], 2, data[1])
        await recorded.compute(models[2], 1, data[0])
        engine.failed = False
        with pytest.raises(grpc.aio.AioRpcError):
            await recorded.compute(models[2], 2, data[1])
        steps = [await recorded.step(models[index], n) for index, n in enumerate((3, 3, 2))]
        assert steps[0] == steps[1] != steps[2]
        only_first = await recorded.create()
        await recorded.compute(only_first, 1, data[0])
        assert steps[2] == await recorded.step(only_first, 2)


# --- one engine -------------------------------------------------------------------------------


def domain_to_pb(data: Sequence[Datum]) -> list[pb.Datum]:
    return [datum_to_pb(datum) for datum in data]


@pytest.mark.parametrize("name", ["reference", "deepspeed"])
@pytest.mark.parametrize("broken", ["first", "later"])
def test_an_engine_that_fails_within_a_part_keeps_what_waited(
    tiny_model: Path, name: str, broken: str
) -> None:
    """A token outside the vocabulary, which no server lets through, breaks the forward itself;
    the step that follows is, bit for bit, that of a model that saw no such call."""
    engine = make_engine(
        name, str(tiny_model), dtype="float32", zero_stage=1, on_progress=lambda _: None
    )
    commands, answers = Commands(engine, world_size=1), list[link_pb.AttachRequest]()

    def apply(model_id: str, **command: Any) -> link_pb.AttachRequest:
        commands.apply(link_pb.AttachResponse(model_id=model_id, **command), answers.append)
        return answers[-1]

    def compute(model_id: str, data: Sequence[Datum], place: link_pb.BatchPlace.ValueType) -> str:
        packed = [datum.SerializeToString() for datum in domain_to_pb(data)]
        command = link_pb.Compute(loss_fn=CROSS_ENTROPY, data=packed, backward=True, place=place)
        return str(apply(model_id, compute=command).WhichOneof("content"))

    good, more = make_data(1, 3), make_data(2, 3)
    bad = [*more[:2], Datum(np.full_like(more[2].tokens, 10**6), more[2].loss_fn_inputs)]
    for model_id in ("calm", "failing"):
        lora = convert.lora_to_pb(LoraConfig(rank=2, seed=3))
        apply(model_id, create_model=link_pb.CreateModel(lora_config=lora))
        assert compute(model_id, good, link_pb.BATCH_PLACE_UNSPECIFIED) == "done"
    if broken == "later":
        assert compute("failing", more, link_pb.BATCH_PLACE_FIRST) == "done"
        assert compute("failing", more, link_pb.BATCH_PLACE_LATER) == "done"
        assert compute("failing", bad, link_pb.BATCH_PLACE_LATER) == "failed"
    else:
        assert compute("failing", bad, link_pb.BATCH_PLACE_FIRST) == "failed"
    assert (error_in(answers[-1].failed).reason, answers[-1].failed.model_broken) == (
        "INTERNAL",
        "",
    )
    adam = link_pb.OptimStep(adam_params=ADAM)
    calm, failing = [dict(apply(m, optim_step=adam).done.metrics) for m in ("calm", "failing")]
    assert calm == failing
    calm, failing = [engine.export_state(m, optimizer=True) for m in ("calm", "failing")]
    for arrays, others in ((calm.weights, failing.weights), (calm.optimizer, failing.optimizer)):
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, others[key], err_msg=key)
    for model_id in ("calm", "failing"):
        engine.delete_model(model_id)


# --- a whole cluster --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_parts(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """A cluster of real processes, as `cluster` is one, that cuts calls into small parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_TRAINING_QUANTUM_TOKENS", str(QUANTUM_TOKENS))
        running = RunningCluster(tiny_model, tmp_path_factory.mktemp("small-parts"))
    with running:
        yield running


@pytest.fixture(scope="module")
def stubs(small_parts: RunningCluster) -> Iterator[Cluster]:
    """Generated stubs connected to `small_parts`."""
    with connect(small_parts.address) as connected:
        yield connected


def create(stubs: Cluster, seed: int = 1) -> str:
    lora = pb.LoraConfig(rank=2, seed=seed)
    return stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id


def script(stubs: Cluster, model_id: str) -> list[bytes]:
    """Two steps of two large calls each, and a last forward; returns every answer's bytes."""
    answers: list[Any] = []
    for seq_id in range(1, 7):
        if seq_id % 3 == 0:
            request = pb.OptimStepRequest(model_id=model_id, seq_id=seq_id, adam_params=ADAM)
            answers.append(stubs.training.OptimStep(request))
        else:
            call = forward_backward(model_id, seq_id, data_of(seq_id, 20, 17 + seq_id))
            answers += stubs.training.ForwardBackward(iter([call]))
    last = pb.ForwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY, data=data_of(9, 20, 25))
    answers += stubs.training.Forward(iter([last]))
    assert sum(len(getattr(answer, "outputs", ())) for answer in answers) == 5 * 20
    return [answer.SerializeToString(deterministic=True) for answer in answers]


def weights_and_samples(stubs: Cluster, model_id: str) -> list[bytes]:
    """The adapter's file as it is saved, and what a seeded request samples from it."""
    save = pb.SaveCheckpointRequest(
        model_id=model_id, seq_id=7, name="end", kind=types_pb2.CHECKPOINT_KIND_SAMPLER
    )
    path = stubs.training.SaveCheckpoint(save).checkpoint_path
    read = pb.ReadCheckpointRequest(checkpoint_path=path, file_names=["adapter_model.safetensors"])
    pieces = [r.piece.data for r in stubs.checkpoint.ReadCheckpoint(read)]
    prompt = pb.ModelInput(chunks=[pb.ModelInputChunk(tokens=tensors.encode([5, 6, 7]))])
    sample = pb.SampleRequest(
        checkpoint_path=path,
        prompt=prompt,
        num_samples=4,
        sampling_params=pb.SamplingParams(max_tokens=12, seed=3),
    )
    # How much of a sequence comes at once says how busy the reader is, and nothing of the numbers.
    sequences = [b""] * 2 * sample.num_samples
    for response in stubs.sampler.Sample(sample):
        for delta in response.deltas:
            for offset, tensor in enumerate((delta.tokens, delta.logprobs)):
                sequences[2 * delta.sequence_index + offset] += tensors.decode(tensor).tobytes()
    assert all(sequences)
    return [b"".join(pieces), *sequences]


class Busy:
    """Models that train on large calls from threads of their own until the block ends.

    Attributes:
        results: For each model, the data whose results came back so far.
    """

    def __init__(self, stubs: Cluster, models: int) -> None:
        self.results = [0] * models
        self._stubs = stubs
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._train, args=(i, create(stubs, 2 + i)), daemon=True)
            for i in range(models)
        ]

    def _train(self, index: int, model_id: str) -> None:
        data = data_of(7, 100, 30)
        try:
            while not self._stop.is_set():
                call = forward_backward(model_id, 0, data)
                for response in self._stubs.training.ForwardBackward(iter([call])):
                    self.results[index] += len(response.outputs)
                self._stubs.training.OptimStep(pb.OptimStepRequest(model_id=model_id))
        except Exception as error:
            self._errors.append(error)

    def __enter__(self) -> "Busy":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not self._errors


def test_a_model_is_bit_identical_alone_and_beside_busy_models(stubs: Cluster) -> None:
    """Losses, logprobs, norms, the weights that come of them, and samples."""
    model_id = create(stubs)
    alone = script(stubs, model_id) + weights_and_samples(stubs, model_id)
    with Busy(stubs, 3) as busy:
        while not all(busy.results):
            time.sleep(0.01)
        before = list(busy.results)
        # Until each of the three had results of more than one of its calls: those of a single one
        # may have been computed before.
        while any(now - then <= 100 for now, then in zip(busy.results, before, strict=True)):
            model_id = create(stubs)
            beside = script(stubs, model_id) + weights_and_samples(stubs, model_id)
            assert beside == alone


def test_results_stream_in_order_and_losses_add_up_over_parts(stubs: Cluster) -> None:
    """A call in many parts answers as one: an output per datum, then the sum of all losses."""
    data = data_of(3, 30, 25)
    model_id = create(stubs)
    call = pb.ForwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY, data=data)
    (answer,) = stubs.training.Forward(iter([call]))
    loss = 0.0
    for output, datum in zip(answer.outputs, data, strict=True):
        found = tensors.decode(output.loss_fn_outputs["logprobs"])
        weights = tensors.decode(datum.loss_fn_inputs["weights"])
        own = pb.ForwardRequest(model_id=model_id, loss_fn=CROSS_ENTROPY, data=[datum])
        single = next(stubs.training.Forward(iter([own]))).outputs[0].loss_fn_outputs["logprobs"]
        np.testing.assert_allclose(found, tensors.decode(single), atol=1e-5)
        loss -= float((found * weights).sum())
    assert answer.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)


async def test_a_light_call_is_answered_long_before_a_heavy_one(
    small_parts: RunningCluster,
) -> None:
    """Five small ones of another model are, that come while one call of 800 data is computed: the
    ranks stand in its first part until all are there. How few parts each waits for is counted
    above, where the rank can be held."""
    async with grpc.aio.insecure_channel(small_parts.address) as channel:
        stub: Any = pb.TrainingServiceStub(channel)
        lora = pb.LoraConfig(rank=2)
        heavy, light = [
            (await stub.CreateModel(pb.CreateModelRequest(lora_config=lora))).model.model_id
            for _ in range(2)
        ]
        came: list[str] = []

        async def read(model_id: str, seq_id: int, data: Sequence[pb.Datum]) -> None:
            call = forward_backward(model_id, seq_id, data)
            async for response in stub.ForwardBackward(iter([call])):
                came.extend([model_id] * len(response.outputs))

        async def begin(*calls: tuple[str, int, Sequence[pb.Datum]]) -> list[asyncio.Task[None]]:
            reading = [asyncio.create_task(read(*call)) for call in calls]
            asked = pb.GetModelRequest(model_id=calls[-1][0])
            while (await stub.GetModel(asked)).model.next_seq_id <= calls[-1][1]:
                await asyncio.sleep(0.01)
            return reading

        with hung(*small_parts.rank_pids()):
            reading = await begin((heavy, 1, data_of(1, 800, 30, targets=16)))
            reading += await begin(*((light, n, data_of(n, 1, 10)) for n in range(1, 6)))
        await asyncio.gather(*reading)
    assert Counter(came) == {heavy: 800, light: 5}
    assert light not in came[-100:], "the last message of the heavy call has more than 100 data"
