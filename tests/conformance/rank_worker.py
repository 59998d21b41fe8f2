"""One rank of `test_ranks`: runs a fixed script on the DeepSpeed engine once per case.

Arguments: model folder, folder of a model with experts, folder for the results (`<case>.npz` of
rank 0, `<case>.<rank>.json` with what a rank holds), names of cases.
"""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from data import begin_alike, collect, make_data, make_rl_data
from engines import leave_together, make_engine, on_every_rank
from tinsmithd.domain import AdamParams, CrossEntropy, Datum, FullConfig, LoraConfig
from tinsmithd.loss_fns import Gspo, Ppo
from tinsmithd.trainer.compute.determinism import Determinism
from tinsmithd.trainer.engines.deepspeed import sums, whole_states
from tinsmithd.trainer.engines.interface import Batch, TrainingEngine
from tinsmithd.trainer.process_group import distributed

EVERYTHING = os.environ.get("TINSMITH_TEST_RANKS", "") == "full"
"""Every layout of ranks with every stage, as `make ranks` has it, instead of one of each kind."""
STAGES = {f"stage-{stage}": {"zero_stage": stage} for stage in range(4)}
CASES: Mapping[str, Mapping[str, Any]] = {
    **STAGES,
    "one-resident": {"zero_stage": 1, "resident_models_max": 1},
    "recomputed": {"zero_stage": 0, "activation_bytes_max": 1},
    "offloaded": {"zero_stage": 2, "offload": True},
    "stage-3-kept": {"zero_stage": 3, "gathered_bytes_max": 1 << 30},
    "stage-3-recomputed": {"zero_stage": 3, "activation_bytes_max": 1},
    "stage-3-offloaded": {"zero_stage": 3, "offload": True, "resident_models_max": 1},
}
SPREAD = {"sequence_parallel": 2, "micro_batch_tokens_max": 2}
SPREAD_CASES: Mapping[str, Mapping[str, Any]] = {
    "spread": {"zero_stage": 1, **SPREAD},
    # Without memory nothing stays on one rank; with it, what does not keep the other one waiting.
    "spread-stage-3-recomputed": {"zero_stage": 3, "activation_bytes_max": 1, **SPREAD},
}
"""Two ranks compute a datum together."""
FULL_CASES: Mapping[str, Mapping[str, Any]] = {
    "full-stage-3-offloaded": {"zero_stage": 3, "offload": True},
    # Adapters keep gathered weights, which never get stale; a full model must not.
    "full-stage-3-kept": CASES["stage-3-kept"],
    "full-stage-3-recomputed": CASES["stage-3-recomputed"],
    "full-recomputed": CASES["recomputed"],
    **{f"full-{stage}": STAGES[stage] for stage in STAGES},
    "full-spread-stage-3": SPREAD_CASES["spread-stage-3-recomputed"],
}
"""One model that trains all weights."""
EXPERT_CASES: Mapping[str, Mapping[str, Any]] = {
    **{f"experts-{name}": CASES[name] for name in (*STAGES, "recomputed", "stage-3-recomputed")},
    "experts-spread-stage-3": {"zero_stage": 3, **SPREAD},
}
"""On a model with experts, adapters among them."""
IN_ORDER = "in-order-"
IN_ORDER_CASES: Mapping[str, Mapping[str, Any]] = {
    f"{IN_ORDER}{name}": {**CASES, **FULL_CASES}[name]
    for name in ("stage-0", "stage-1", "full-stage-3")
}
"""As on GPUs that give the same bits each time: ranks add up in their order."""
EVERY_CASE = {**CASES, **SPREAD_CASES, **FULL_CASES, **EXPERT_CASES, **IN_ORDER_CASES}
MODELS = {"m": LoraConfig(rank=4, seed=7), "n": LoraConfig(rank=2, seed=8, train_mlp=False)}
COUNTS = (3, 1, 2, 5)
EPS = (0.1, 1e-12)
"""With the large one a wrong scale of the gradients shows; the small one is what people use."""
RL_LOSSES = {0.1: (Ppo(), Gspo(clip_low_threshold=0.5, clip_high_threshold=2.0)), 1e-12: ()}
"""Beside cross-entropy; what is made of gradients does not know of which loss they are."""


def eps_of(case: str) -> Sequence[float]:
    """The stages have both; what a case adds to its stage, or to its model, is the same to Adam."""
    both = STAGES if EVERYTHING else ("stage-1",)
    return EPS if case.removeprefix("full-") in both else EPS[:1]


def data_of(index: int) -> list[Datum]:
    """Data of a call; of the last one several begin alike."""
    data = make_data(index, COUNTS[index])
    return data if index < len(COUNTS) - 1 else [data[0], *begin_alike(index, data[1:], 20)]


def is_full(case: str) -> bool:
    """Whether a case trains all weights."""
    return case.removeprefix(IN_ORDER) in FULL_CASES


@contextlib.contextmanager
def as_case_says(case: str) -> Iterator[None]:
    """A processor takes part in a case that a GPU alone has."""
    if not case.startswith(IN_ORDER):
        yield
        return
    with mock.patch.object(Determinism, "decide", return_value=True):
        yield


def sums_in_order() -> bool:
    """Whether the ranks add up in their order, to the bit; and otherwise to rounding."""
    rank, ranks = distributed.rank_and_world_size()
    of_ranks = [torch.randn(8 * ranks, generator=torch.manual_seed(r)) for r in range(ranks)]
    expected = of_ranks[0].clone()
    for values in of_ranks[1:]:
        expected += values
    slices = [
        sums.reduce_scatter(of_ranks[rank].clone(), in_order=in_order) for in_order in (True, False)
    ]
    whole = [of_ranks[rank][:5].clone() for _ in range(2)]
    for values, in_order in zip(whole, (True, False), strict=True):
        sums.all_reduce(values, in_order=in_order)
    one = of_ranks[rank].sum()
    sums.all_reduce(one, in_order=True)
    torch.testing.assert_close(slices[1], expected.chunk(ranks)[rank])
    torch.testing.assert_close(whole[1], expected[:5])
    torch.testing.assert_close(one, sum(values.sum() for values in of_ranks))
    same = torch.equal(slices[0], expected.chunk(ranks)[rank])
    return same and torch.equal(whole[0], expected[:5])


def script(engine: TrainingEngine, all_eps: Sequence[float] = EPS) -> dict[str, np.ndarray]:
    """Two models interleaved, uneven data, fewer data than ranks, a save and a load."""
    results: dict[str, np.ndarray] = {}
    for eps in all_eps:
        for model_id, lora in MODELS.items():
            engine.create_model(model_id, lora)
        for name, array in _train(engine, eps).items():
            results[f"eps {eps:g} {name}"] = array
        for model_id in MODELS:
            engine.delete_model(model_id)
    return results


def full_script(engine: TrainingEngine, all_eps: Sequence[float] = EPS) -> dict[str, np.ndarray]:
    """One full model at a time, uneven data, fewer data than ranks, a save and a load."""
    results: dict[str, np.ndarray] = {}
    for eps in all_eps:
        engine.create_model("full", FullConfig())
        adam = AdamParams(
            learning_rate=1e-2 if eps > 1e-3 else 1e-4,
            eps=eps,
            weight_decay=0.1,
            grad_clip_norm=50.0,
        )
        for index in range(len(COUNTS)):
            data = data_of(index)
            metrics, logprobs = collect(engine, "full", data, backward=True)
            results[f"eps {eps:g} loss {index}"] = np.array(metrics["loss:sum"])
            results[f"eps {eps:g} logprobs {index}"] = np.concatenate(logprobs)
            if index % 2:
                step = engine.optim_step("full", adam)
                results[f"eps {eps:g} norm {index}"] = np.array(step["grad_norm:last"])
            metrics, _ = collect(engine, "full", data, backward=False)
            results[f"eps {eps:g} loss without gradients {index}"] = np.array(metrics["loss:sum"])
            if index == 1:
                _save_and_load(engine, "full")
        for name, array in engine.export_state("full", optimizer=False).weights.items():
            results[f"eps {eps:g} weight {name}"] = array
        engine.delete_model("full")
    return results


def _train(engine: TrainingEngine, eps: float) -> dict[str, np.ndarray]:
    results: dict[str, np.ndarray] = {}
    adam = AdamParams(learning_rate=1e-2 if eps > 1e-3 else 1e-4, eps=eps, grad_clip_norm=80.0)
    for index in range(len(COUNTS)):
        for model_id in MODELS:
            metrics, logprobs = collect(engine, model_id, data_of(index), backward=True)
            results[f"{model_id} loss {index}"] = np.array(metrics["loss:sum"])
            results[f"{model_id} logprobs {index}"] = np.concatenate(logprobs)
            for loss_fn in RL_LOSSES[eps]:
                data = _rl_data(index, logprobs)
                metrics, _ = collect(engine, model_id, data, loss_fn, backward=True)
                results[f"{model_id} {loss_fn.name} {index}"] = np.array(metrics["loss:sum"])
            if index % 2:
                step = engine.optim_step(model_id, adam)
                results[f"{model_id} norm {index}"] = np.array(step["grad_norm:last"])
        if index == 1:
            _save_and_load(engine, "m")
    for model_id in MODELS:
        state = engine.export_state(model_id, optimizer=True)
        for name, array in state.weights.items():
            results[f"{model_id} weight {name}"] = array
    return results


def _save_and_load(engine: TrainingEngine, model_id: str) -> None:
    state = on_every_rank(engine.export_state(model_id, optimizer=True))
    engine.delete_model(model_id)
    engine.create_model(model_id, state.tuning)
    engine.import_state(model_id, state, optimizer=True)


def _rl_data(index: int, logprobs: Sequence[np.ndarray]) -> list[Datum]:
    """Data whose sampling logprobs are near those of the model; a loss reads what it needs."""
    rng = np.random.default_rng(index)
    near = [lp + rng.normal(scale=0.1, size=lp.shape).astype(np.float32) for lp in logprobs]
    return [
        Datum(
            datum.tokens,
            {**datum.loss_fn_inputs, "sequence_ratio_mask": np.ones(len(datum.tokens), np.float32)},
        )
        for datum in make_rl_data(index, data_of(index), near)
    ]


def held(engine: Any) -> dict[str, Any]:
    """Elements that this rank holds: of the base, of all of it, and of the resident adapters."""
    parameters = dict(engine.engine._base.model.named_parameters())
    base = {name: p for name, p in parameters.items() if "lora_" not in name}
    partitioned = [p for p in base.values() if hasattr(p, "ds_tensor")]
    here = sum(p.ds_tensor.numel() for p in partitioned) + sum(p.numel() for p in base.values())
    return {
        "base": here,
        "whole": sum(getattr(p, "ds_numel", p.numel()) for p in base.values()),
        "adapters": sum(p.numel() for name, p in parameters.items() if "lora_" in name),
    }


def held_by_full(engine: Any) -> dict[str, int]:
    """Elements that this rank holds of a full model: weights, gradients, one of the moments."""
    model, slot = engine.engine._models.use("full")
    parameters = slot.parameters
    partitioned = [p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor")]
    return {
        "weights": sum(partitioned) + sum(p.numel() for p in parameters),
        "whole": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "gradients": model.pending.copy().numel(),
        "moments": slot.zero._own_moments()[0].numel(),
    }


def copied(engine: TrainingEngine, model_id: str) -> dict[str, int]:
    """Bytes that a copy of a model's state brings to this rank's host memory, and those it has."""
    bytes_count = 0
    real = whole_states.host_copy

    def counted(flat: torch.Tensor, *into: torch.Tensor) -> torch.Tensor:
        nonlocal bytes_count
        bytes_count += flat.numel() * flat.element_size()
        return real(flat, *into)

    with mock.patch.object(whole_states, "host_copy", counted):
        state = engine.export_state(model_id, optimizer=True)
    arrays = [*state.weights.values(), *state.optimizer.values()]
    return {"copied": bytes_count, "state": sum(array.nbytes for array in arrays)}


COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "barrier"),
    *("broadcast", "gather", "reduce", "reduce_scatter_tensor", "scatter"),
)
"""All of `torch.distributed` that an engine may have tensors go through."""


def collectives(engine: Any, tokens_max: int) -> dict[str, Any]:
    """What ranks said to each other in one call and a step, and in how many micro-batches.

    Args:
        engine: With a model "resident".
        tokens_max: Maximum tokens of a micro-batch.
    """
    counts: Counter[str] = Counter()
    engine.engine._micro_batch_tokens_max = tokens_max
    batch = Batch("resident", make_data(5, 24), CrossEntropy(), backward=True)
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            real = getattr(dist, name)

            def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                counts[name] += 1
                return real(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counted))
        result = engine.forward(batch, lambda *_: None)
        engine.optim_step("resident", AdamParams())
    rounds = json.loads(result.composition)["rounds"]
    count = sum(len(of_rank) for round_ in rounds for of_rank in round_)
    return {"micro_batches": count, "counts": counts}


def run(case: str, folder: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the ranks compute in a case, and what this one holds and says."""
    engine = make_engine("deepspeed", folder, dtype="float32", **EVERY_CASE[case])
    if is_full(case):
        results = full_script(engine, eps_of(case))
        engine.create_model("full", FullConfig())
        engine.optim_step("full", AdamParams())
        collect(engine, "full", make_data(0, 2), backward=True)
        engine.engine._release()
        return results, {**held_by_full(engine), **copied(engine, "full")}
    results = script(engine, eps_of(case))
    engine.create_model("resident", MODELS["m"])
    found = held(engine)
    engine.optim_step("resident", AdamParams())
    found |= copied(engine, "resident")
    if case.startswith(IN_ORDER):
        found["in order"] = sums_in_order()
    if case in STAGES:
        found["collectives"] = [collectives(engine, most) for most in (1000, 16)]
    return results, found


def main() -> None:
    dense, with_experts, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    rank, _ = distributed.rank_and_world_size()
    for case in cases:
        with as_case_says(case):
            results, found = run(case, with_experts if case in EXPERT_CASES else dense)
        Path(out, f"{case}.{rank}.json").write_text(json.dumps(found))
        if rank == 0:
            np.savez(Path(out, f"{case}.npz"), **results)
    leave_together(rank)


if __name__ == "__main__":
    main()
