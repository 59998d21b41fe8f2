"""What Prometheus reads: exact counts of a script's calls, and nothing that a user named."""

import contextlib
import os
import re
import signal
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import tinsmith
from clusters import RunningCluster, until_health
from faults.processes import hung
from monitoring.series import OF_PROCESSES, every
from recorded_cluster import data_of, forward_backward
from tinsmith import types
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig, TrainingConfig

CANARY = "canary-4711"
TOKENS = 6
# Operations of a forward of a datum of so many tokens on the tiny model; norms count, too.
_LAYER = 32 * 8 * 2 * (4 + 2) + 3 * 32 * 48 + 2 * 32
PRODUCTS = 2 * (2 * _LAYER + 32 + 320 * 32) * TOKENS
ATTENTION = 4 * 2 * 32 * TOKENS * (TOKENS + 1) // 2
SNAPSHOT_STEPS = TrainingConfig().snapshot_steps
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A cluster whose servers have metrics."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRAINING", "SAMPLER", "CHECKPOINT", "GATEWAY"):
            patch.setenv(f"TINSMITH_{name}_METRICS_ADDRESS", "127.0.0.1:0")
            patch.setenv(f"TINSMITH_{name}_METRICS_TENANTS_MAX", "2")
        patch.setenv("TINSMITH_TRAINING_PEAK_FLOPS", "1e12")
        running = RunningCluster(tiny_model, tmp_path_factory.mktemp("metrics"), gateway_port=0)
    with running:
        yield running


def text_of(cluster: RunningCluster, name: str) -> str:
    """What a scrape of a server gives."""
    log = (cluster.logs / f"{name}.log").read_text()
    url = re.findall(r"metrics are at (http://\S+)", log)[-1]
    with urllib.request.urlopen(url, timeout=60) as response:
        return str(response.read().decode())


def values_of(text: str) -> Values:
    """Value by name and labels; what Prometheus could not read raises."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def values(cluster: RunningCluster, name: str = "training") -> Values:
    """What a server says now."""
    return values_of(text_of(cluster, name))


def value(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset(labels.items())]


def growth(now: Values, before: Values, name: str, **labels: str) -> float:
    """How much a series rose; that of a tenant begins with its first call."""
    return value(now, name, **labels) - before.get((name, frozenset(labels.items())), 0.0)


def handled(values: Values) -> Counter[tuple[str, str, str]]:
    """Calls by type, method and code."""
    found: Counter[tuple[str, str, str]] = Counter()
    for (name, pairs), count in values.items():
        labels = dict(pairs)
        if name == "grpc_server_handled_total" and ".internal." not in labels["grpc_service"]:
            key = (labels["grpc_type"], labels["grpc_method"], labels["grpc_code"])
            found[key] = int(count)
    return found


def until(found: Callable[[], bool]) -> None:
    """A call is counted when the server is done with it, which may be after its caller is."""
    while not found():
        time.sleep(0.02)


def check_training(now: Values, before: Values) -> None:
    """What the script below makes of the Training server's series."""
    calls = handled(now) - handled(before)
    assert calls["bidi_stream", "ForwardBackward", "OK"] == 2
    assert calls["bidi_stream", "Forward", "OK"] == 1
    assert calls["unary", "OptimStep", "OK"] == 1
    assert calls["unary", "SaveCheckpoint", "OK"] == 1
    assert {code for _, _, code in calls} == {"OK", "NotFound"}
    grew = partial(growth, now, before)
    tokens = "tinsmith_training_computed_tokens_total"
    assert grew(tokens, kind="forward_backward") == 2 * 3 * TOKENS
    assert grew(tokens, kind="forward") == TOKENS
    assert grew(tokens, kind="replay") == 0
    assert grew("tinsmith_training_engine_seconds_total", kind="forward_backward") > 0
    assert grew("tinsmith_training_steps_total") == 1
    assert grew("tinsmith_training_tenant_computed_tokens_total", tenant="default") == 7 * TOKENS
    made = 6 * (2 * PRODUCTS + 3 * ATTENTION) + PRODUCTS + ATTENTION
    assert grew("tinsmith_training_useful_flops_total") == made
    assert value(now, "tinsmith_training_peak_flops") == 1e12
    assert value(now, "tinsmith_training_rank_silence_seconds") < 30
    assert value(now, "tinsmith_training_rank_command_seconds") == 0
    assert value(now, "tinsmith_training_journal_bytes") > 0
    assert value(now, "tinsmith_training_journal_fenced") == 0
    assert grew("tinsmith_training_models") == 1
    assert grew("tinsmith_training_journal_commit_seconds_count") >= 5
    assert grew("tinsmith_training_journal_commit_seconds_sum") > 0
    assert value(now, "tinsmith_training_calls_pending") == 0
    assert value(now, "tinsmith_training_ranks") == 1
    assert value(now, "tinsmith_training_journal_writable") == 1
    assert value(now, "tinsmith_serving", service="tinsmith.v1.TrainingService") == 1
    assert value(now, "tinsmith_disk_free_bytes") > 0


def test_a_script_is_counted(cluster: RunningCluster) -> None:
    """Calls by code, tokens, steps, samples and checkpoints; and nothing that a user named."""
    before = {name: values(cluster, name) for name in cluster.addresses}
    service = tinsmith.ServiceClient(base_url=cluster.address)
    model = service.create_lora_training_client(
        cluster.base_model, rank=2, seed=1, user_metadata={"note": CANARY}
    ).result(60)
    data = [
        types.Datum(
            types.ModelInput.from_ints([1] * TOKENS),
            {"target_tokens": np.ones(TOKENS, np.int64), "weights": np.ones(TOKENS, np.float32)},
        )
    ]
    for _ in range(2):
        model.forward_backward(data * 3, "cross_entropy").result(60)
    model.optim_step(types.AdamParams(learning_rate=1e-3)).result(60)
    model.forward(data, "cross_entropy").result(60)
    sampler = model.save_weights_and_get_sampling_client(name=CANARY)
    prompt, params = types.ModelInput.from_ints([5, 6, 7]), types.SamplingParams(max_tokens=4)
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result(60)
    with pytest.raises(tinsmith.NotFoundError):
        service.create_training_client_from_state(f"tinsmith://{CANARY}/weights/one").result(60)
    not_found = ("unary", "CreateModel", "NotFound")
    until(lambda: handled(values(cluster))[not_found] > handled(before["training"])[not_found])

    texts = [text_of(cluster, name) for name in ("training", "sampler", "checkpoint")]
    check_training(values_of(texts[0]), before["training"])
    now = values_of(texts[1])
    grew = partial(growth, now, before["sampler"])
    assert (handled(now) - handled(before["sampler"]))["server_stream", "Sample", "OK"] == 1
    found = sum(len(sequence.tokens) for sequence in sampled.sequences)
    assert grew("tinsmith_sampler_sampled_tokens_total") == found > 0
    assert grew("tinsmith_sampler_prompt_tokens_total") == 3
    assert grew("tinsmith_sampler_tenant_prompt_tokens_total", tenant="default") == 3
    assert grew("tinsmith_sampler_tenant_sampled_tokens_total", tenant="default") == found
    assert grew("tinsmith_sampler_first_token_seconds_count") == 1
    assert grew("tinsmith_sampler_adapters") == 1
    assert value(now, "tinsmith_sampler_requests_running") == 0

    now = values_of(texts[2])
    grew = partial(growth, now, before["checkpoint"])
    writes = (handled(now) - handled(before["checkpoint"]))[
        "client_stream", "WriteCheckpoint", "OK"
    ]
    assert writes == 1
    assert grew("tinsmith_checkpoint_checkpoints", kind="sampler") == 1
    assert grew("tinsmith_checkpoint_checkpoints", kind="training") == 0
    model_id = model.get_info().model_id
    assert not [word for word in (CANARY, model_id) for text in texts if word in text]


def test_memory_of_ranks_is_seen(cluster: RunningCluster) -> None:
    """As the kernel has it of the process, for a rank on a CPU without a device's."""
    name = "tinsmith_training_rank_resident_bytes"
    until(lambda: (name, frozenset({("rank", "0")})) in values(cluster))
    (rank,) = cluster.rank_pids()

    def is_right() -> bool:
        resident = psutil.Process(rank).memory_info().rss
        return value(values(cluster), name, rank="0") == pytest.approx(resident, rel=0.3)

    until(is_right)  # what it said last may be from before it computed
    assert not [each for each, _ in values(cluster) if "rank_device" in each]


def test_everything_that_is_exposed_is_described_and_the_other_way(cluster: RunningCluster) -> None:
    """Name, kind, text and labels are those of docs/metrics.md; what is there only with this or
    that is said there."""
    with connect(cluster.address) as stubs:
        model_id = create(stubs)
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))
    urllib.request.urlopen(f"{cluster.gateway_url}/healthz", timeout=30).close()
    described, exposed = every(), set()
    for name in cluster.addresses:
        for family in text_string_to_metric_families(text_of(cluster, name)):
            total = "_total" if family.type == "counter" else ""
            if family.name.startswith("process_"):
                assert family.name + total in OF_PROCESSES
                continue
            series = described[family.name + total]
            assert (family.type, family.documentation) == (series.kind, series.text)
            for sample in family.samples:
                assert sample.labels.keys() - {"le"} == set(series.labels), sample
            exposed.add(series.name)
    missing = {each.name for each in described.values() if not each.only} - exposed
    assert not missing


def test_snapshots_are_counted_and_what_they_lack_has_an_age(cluster: RunningCluster) -> None:
    """The first steps have none until one is due, with the twentieth."""
    before = values(cluster)
    with connect(cluster.address) as stubs:
        model_id = create(stubs)
        for seq_id in range(1, 2 * SNAPSHOT_STEPS + 2, 2):
            call = forward_backward(model_id, seq_id, data_of(1, 2, TOKENS))
            list(stubs.training.ForwardBackward(iter([call])))
            stubs.training.OptimStep(pb.OptimStepRequest(model_id=model_id, seq_id=seq_id + 1))
        name = "tinsmith_training_snapshots"
        until(lambda: growth(values(cluster), before, f"{name}_total") >= 1)
        now = values(cluster)
        assert growth(now, before, f"{name}_failed_total") == 0
        assert growth(now, before, f"{name}_damaged_total") == 0
        # That of all models: one of another test may wait for its first since long ago.
        lived_s = time.time() - psutil.Process(cluster.pid("training")).create_time()
        assert 0 <= value(now, "tinsmith_training_snapshot_age_seconds") < lived_s
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


def test_logprobs_that_are_not_the_samplers_are_seen(cluster: RunningCluster) -> None:
    """Of tokens with an advantage, however the call computes; what else is in `logprobs` is not."""
    service = tinsmith.ServiceClient(base_url=cluster.address)
    model = service.create_lora_training_client(cluster.base_model, rank=2, seed=1).result(60)
    prompt, targets = types.ModelInput.from_ints([1] * TOKENS), np.ones(TOKENS, np.int64)
    weights = np.ones(TOKENS, np.float32)
    scored = types.Datum(prompt, {"target_tokens": targets, "weights": weights})
    found = model.forward([scored], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"]
    apart = np.array([9.0, 9.0, 2e-5, -0.02, 0.02, 2.0], np.float32)  # two are of the prompt
    inputs = {
        "target_tokens": targets,
        "logprobs": np.asarray(found, np.float32) + apart,
        "advantages": np.array([0, 0, 1, -1, 1, 1], np.float32),
    }
    before = values(cluster)
    data = [types.Datum(prompt, inputs)] * 2
    model.forward_backward(data, "importance_sampling").result(60)
    model.forward(data, "ppo").result(60)
    model.forward([scored], "cross_entropy").result(60)
    grew = partial(growth, values(cluster), before)
    name, calls = "tinsmith_training_mismatch", 4
    counts = {le: grew(f"{name}_nats_bucket", le=le) for le in ("1e-05", "0.01", "0.1", "+Inf")}
    assert counts == {"1e-05": 0, "0.01": calls, "0.1": 3 * calls, "+Inf": 4 * calls}
    assert grew(f"{name}_nats_count") == 4 * calls
    assert grew(f"{name}_nats_sum") == pytest.approx(2.04002 * calls, rel=1e-4)
    assert grew(f"{name}_kl_nats_total") == pytest.approx(2.0004 * calls, rel=1e-4)


def create(stubs: Cluster) -> str:
    lora = pb.LoraConfig(rank=2, seed=1)
    return stubs.training.CreateModel(pb.CreateModelRequest(lora_config=lora)).model.model_id


def test_a_call_that_its_caller_gives_up_is_canceled(cluster: RunningCluster) -> None:
    """It waits for a number before its own, and is counted under that code."""
    with connect(cluster.address) as stubs:
        model_id = create(stubs)
        later = forward_backward(model_id, 3, data_of(1, 2, TOKENS))
        call = stubs.training.ForwardBackward(iter([later]))
        until(lambda: value(values(cluster), "tinsmith_training_calls_pending") == 1)
        call.cancel()
        until(lambda: handled(values(cluster))["bidi_stream", "ForwardBackward", "Canceled"] == 1)
        # The call itself waits on, and would hold up the end of the server.
        stubs.training.DeleteModel(pb.DeleteModelRequest(model_id=model_id))


@contextlib.contextmanager
def no_new_ranks(cluster: RunningCluster, rank: int) -> Iterator[None]:
    """For the body of the `with` no ranks come that could be at work before somebody looks: what
    they are forked from hangs. Where they are not forked they take much longer than a look."""
    origin = psutil.Process(rank).ppid()
    with contextlib.nullcontext() if origin == cluster.pid("training") else hung(origin):
        yield


def test_dead_ranks_are_seen_and_no_step_counts_twice(cluster: RunningCluster) -> None:
    """Another rank group, the model brought back, calls made again; the same number of steps."""
    stubs = connect(cluster.address)
    model_id = create(stubs)
    before = values(cluster)

    def train(first: int) -> None:
        for seq_id in range(first, first + 4, 2):
            call = forward_backward(model_id, seq_id, data_of(1, 2, TOKENS))
            list(stubs.training.ForwardBackward(iter([call])))
            step = pb.OptimStepRequest(model_id=model_id, seq_id=seq_id + 1)
            stubs.training.OptimStep(step)

    with stubs:
        train(1)
        (rank,) = cluster.rank_pids()
        with no_new_ranks(cluster, rank):
            os.kill(rank, signal.SIGKILL)
            until_health(cluster.address, serving=False)
            now = values(cluster)
        assert value(now, "tinsmith_training_ranks") == 0
        models = value(now, "tinsmith_training_models")
        assert value(now, "tinsmith_training_models_suspended") == models
        train(5)
    now = values(cluster)
    grew = partial(growth, now, before)
    tokens = "tinsmith_training_computed_tokens_total"
    assert grew(tokens, kind="forward_backward") == 4 * 2 * TOKENS
    assert grew(tokens, kind="replay") == 2 * 2 * TOKENS
    assert grew("tinsmith_training_steps_total") == 4
    assert grew("tinsmith_training_models_restored_total") == 1  # nobody called the others
    assert grew("tinsmith_training_rank_groups_attached_total") == 1


async def test_metrics_are_off_unless_asked_for(tmp_path: Path) -> None:
    """No second port, and nothing between a call and its servicer."""
    server = CheckpointServer(
        CheckpointConfig(listen_address="127.0.0.1:0", data_folder=str(tmp_path))
    )
    await server.start()
    assert server._rpc.metrics_port == 0
    await server.stop()


async def test_a_taken_metrics_port_is_one_line(tmp_path: Path) -> None:
    """It names the address, as a taken gRPC port does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = CheckpointConfig(
            listen_address="127.0.0.1:0", data_folder=str(tmp_path), metrics_address=address
        )
        server = CheckpointServer(config)
        with pytest.raises(OSError, match=f"cannot listen on {address} for metrics") as refusal:
            await server.start()
        assert refusal.value.strerror
        await server.stop()
