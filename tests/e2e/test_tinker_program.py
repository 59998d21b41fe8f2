"""A program that says `import tinker`, from its first line to its workers, on a real cluster."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import programs
import tinsmith
from clusters import RunningCluster

PROGRAM = """
import asyncio, concurrent.futures, multiprocessing, sys

import numpy as np
import tinker
from tinker import types
from tinker.lib.public_interfaces import APIFuture
from tinker.lib.public_interfaces.rest_client import RestClient
from tinker.types.tensor_data import TensorData

BASE = "org/" + sys.argv[1]


def worker(handle):
    import tinker as again  # this process was spawned: nobody bound the name here but tinsmith
    sampler = again.SamplingClient.from_sampler_handle(handle)
    prompt = types.ModelInput.from_ints([5, 6])
    return sampler.sample(prompt, 1, params()).result().sequences[0].tokens


def params():
    return types.SamplingParams(max_tokens=4, seed=3, temperature=1.0)


def rollout(sampler):
    prompt = types.ModelInput(chunks=[{"type": "encoded_text", "tokens": [5, 6, 7]}])
    futures = [sampler.sample(prompt, 2, params()) for _ in range(3)]
    assert all(isinstance(each, APIFuture) for each in futures)
    done, waiting = concurrent.futures.wait(futures)
    assert not waiting
    for sequence in (s for future in futures for s in future.result().sequences):
        tokens, n = prompt.to_ints() + sequence.tokens, len(sequence.tokens)
        datum = tinker.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": tokens[1:],
                "logprobs": [0.0] * 2 + sequence.logprobs,
                "advantages": [0.0] * 2 + [1.0] * n,
            },
        )
        yield datum.with_provenance(
            model_input=[
                types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, length=3),
                types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=n - 1),
            ],
            loss_fn_inputs=[
                types.PromptProvenanceSpan(
                    sequence_id=sequence.sequence_id, offset=1, length=2
                ),
                types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=n),
            ],
        )


def main():
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(BASE, rank=4, seed=1)
    assert isinstance(trainer, tinker.TrainingClient) and isinstance(trainer, APIFuture)
    plain = {"target_tokens": [6, 7, 8]}
    weighted = {**plain, "weights": [1.0, 1.0, 1.0]}
    prompt = types.ModelInput.from_ints([5, 6, 7])
    losses = [
        trainer.forward([tinker.Datum(prompt, inputs)], "cross_entropy").result()
        for inputs in (plain, weighted)
    ]
    assert losses[0].metrics == losses[1].metrics
    logprobs = losses[0].loss_fn_outputs[0]["logprobs"]
    assert type(logprobs) is TensorData and logprobs.shape == [3]
    assert np.isclose(-sum(logprobs.data), losses[0].metrics["loss:sum"])
    assert np.exp(logprobs).max() < 1 and (logprobs * 2).shape == (3,)
    logprobs.to_numpy()[:] = 0

    moving = trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    first = moving.model_path
    data = list(rollout(moving))
    trainer.forward_backward(data, "importance_sampling")
    trainer.optim_step(types.AdamParams(learning_rate=0.5)).result()
    other = trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    assert moving.model_path == other.model_path != first
    assert moving.sample(prompt, 1, params()).result().sequences[0].tokens

    handle = other.get_sampler_handle()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(worker, (handle,))
    here = other.sample(types.ModelInput.from_ints([5, 6]), 1, params()).result()
    assert there == here.sequences[0].tokens

    saved = trainer.save_state("done", ttl_seconds=3600).result()
    rest = RestClient()
    info = trainer.get_info()
    session = info.model_id.partition(":")[0]
    assert session in rest.list_sessions().result().sessions
    assert rest.get_session(session).result().training_run_ids == [info.model_id]
    listed = rest.list_checkpoints(info.model_id).result().checkpoints
    assert saved.path in [each.tinker_path for each in listed]
    assert listed[0].model_dump(mode="json")["checkpoint_id"].startswith(("weights", "sampler"))
    try:
        trainer.forward_backward(data, "stable_reinforce")
    except tinker.TinkerError as refusal:
        assert "importance_sampling" in str(refusal) and refusal.status_code == 501
    else:
        raise AssertionError("stable_reinforce was taken")
    assert trainer.unload_model().result().model_id == info.model_id
    print("done", tinker.__version__, len(data))


if __name__ == "__main__":
    main()
"""


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    environment = programs.variables(**variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)


def test_a_program_of_tinkers_runs_unchanged(cluster: RunningCluster, tmp_path: Path) -> None:
    """Trains, samples with provenance, goes on in a spawned worker, lists, and is refused."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    url = f"http://{cluster.address}/"
    done = run(
        *("-m", "tinsmith.tinker", str(script), cluster.base_model),
        TINKER_BASE_URL=url,
        TINKER_API_KEY="tml-anything",
        TINSMITH_ADDRESS="",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 0.38.0 6\n"


def test_modules_scripts_and_started_programs_are_bound(tmp_path: Path) -> None:
    """`-m`, the arguments, the place of imports, and a program that the program starts."""
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "tinker.py").write_text("raise SystemExit('this is another tinker')\n")
    text = """
        import importlib.metadata, subprocess, sys
        import tinker, tinker._version, beside
        child = "import tinker; print(tinker.ServiceClient.__module__)"
        print(__name__, sys.argv[1:], beside.VALUE, tinker._version.__version__)
        print(importlib.metadata.version("tinker"), tinker.types.datum.Datum is tinker.Datum)
        if len(sys.argv) > 1:
            subprocess.run([sys.executable, "-c", child], check=True)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    outputs = [
        run("-m", "tinsmith.tinker", str(tmp_path / "script.py"), "a", "b"),
        run("-m", "tinsmith.tinker", "-m", "script", PYTHONPATH=python_path(tmp_path)),
    ]
    for done in outputs:
        assert done.returncode == 0, done.stderr
    lines = [done.stdout.splitlines() for done in outputs]
    assert lines[0] == [
        "__main__ ['a', 'b'] 7 0.38.0",
        "0.38.0 True",
        "tinsmith.service_client",
    ]
    assert lines[1] == ["__main__ [] 7 0.38.0", "0.38.0 True"]
    refused = run("-m", "tinsmith.tinker", str(tmp_path / "nothing.py"))
    assert (refused.returncode, "nothing.py" in refused.stderr) == (2, True)


def python_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), programs.variables()["PYTHONPATH"]])


def test_another_tinker_that_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    """It would be two kinds of one class; and installing twice is installing once."""
    (tmp_path / "tinker.py").write_text("ServiceClient = None\n")
    code = "import tinker, tinsmith.tinker; tinsmith.tinker.install()"
    done = run("-c", code, PYTHONPATH=python_path(tmp_path))
    assert "ImportError: tinker is imported already" in done.stderr
    assert "python -m tinsmith.tinker" in done.stderr
    code = "import tinsmith.tinker as t; t.install(); t.install(); import tinker; print(tinker)"
    done = run("-c", code, PYTHONPATH=python_path(tmp_path))
    assert done.stdout.startswith("<module 'tinker'"), done.stderr


@pytest.mark.parametrize("handle", ["", "x", "eyJ2ZXJzaW9uIjogMn0", "[]", "W10", "é", "A" * 20_000])
def test_a_handle_that_is_none_is_refused(handle: str) -> None:
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        tinsmith.SamplingClient.from_sampler_handle(handle)
    assert refusal.value.field == "handle"


def test_results_compute_with_numpy_and_torch() -> None:
    """One type, whatever the caller works with; what it gives out is the caller's to change."""
    torch = pytest.importorskip("torch")
    made = tinsmith.TensorData(np.array([1.0, 2.0], np.float32))
    tensor = torch.tensor([3.0, 4.0], requires_grad=True)
    for found in (tensor * made, made * tensor, torch.add(tensor, made), made + tensor):
        assert isinstance(found, torch.Tensor)
        assert found.requires_grad
    assert torch.cat([made, made]).tolist() == [1, 2, 1, 2]
    assert torch.stack([made, tensor]).shape == (2, 2)
    assert np.concatenate([made, made]).tolist() == [1, 2, 1, 2]
    for found in (made + 1, 1 + made, -made, np.exp(made), made - np.ones(2), abs(made)):
        assert isinstance(found, np.ndarray)
    assert (2 - made).tolist() == [1, 0]
    assert (made > 1).tolist() == [False, True]
    array = np.asarray(made)
    array[:] = 9
    made.to_torch()[:] = 9
    assert made.tolist() == [1, 2]
