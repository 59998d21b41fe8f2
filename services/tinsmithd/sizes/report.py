"""Says a plan: as text for a person, as plain values for JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from tinsmithd.sizes.plan import GB, MICRO_BATCH_TOKENS_MAX, Layout, Plan, gb
from tinsmithd.sizes.ranks import RankBytes
from tinsmithd.tunings import LoraConfig


def text(plan: Plan) -> str:
    """For a person."""
    return "\n".join([*_about(plan), "", *_stages(plan), "", *_layout(plan), *_disks(plan)])


def document(plan: Plan) -> dict[str, Any]:
    """For a program: every figure in bytes, parameters or tokens."""
    layout = plan.layout
    return {
        "model": asdict(plan.model),
        "gpus": plan.machine.gpus,
        "gpu_bytes": plan.machine.gpu_bytes,
        "gpu_usable_bytes": plan.machine.usable_bytes,
        "tuning": plan.wanted.tuning.to_document(),
        "dtype": plan.wanted.dtype,
        "parameters": plan.parameter_count,
        "active_parameters": plan.active_parameter_count,
        "adapter_parameters": plan.adapter_parameter_count,
        "activations": asdict(plan.activations),
        "stages": {
            kind: {str(stage): _of_rank(rank) for stage, rank in stages.items()}
            for kind, stages in plan.stages.items()
        },
        "base_files_bytes": plan.base_files_bytes,
        "sampler_checkpoint_bytes": plan.weights_bytes,
        "training_checkpoint_bytes": plan.state_bytes,
        "snapshots_bytes": plan.snapshots_bytes,
        "sampler_bytes": plan.sampler_bytes,
        "sampler_kv_bytes_per_token": plan.kv_bytes,
        "sampler_tokens": plan.sampler_tokens,
        "fits": layout is not None,
        "refusal": plan.refusal,
        "layout": None if layout is None else {**vars(layout), "rank": _of_rank(layout.rank)},
    }


def _of_rank(rank: RankBytes) -> Mapping[str, int]:
    return {**asdict(rank), "kept": rank.kept, "on_device": rank.on_device}


def _about(plan: Plan) -> Iterator[str]:
    model = plan.model
    line = f"{model.name} ({model.model_type}): {_count(plan.parameter_count)} parameters"
    if model.expert_count:
        line += f", {_count(plan.active_parameter_count)} of them active for a token"
    yield line
    tuning = plan.wanted.tuning
    if isinstance(tuning, LoraConfig):
        kinds = ("attn", "mlp", "unembed")
        on = "+".join(kind for kind in kinds if getattr(tuning, f"train_{kind}"))
        rank = str(tuning.rank)
        if tuning.expert_adapter_rank != tuning.rank:
            rank += f" ({tuning.expert_rank} on each expert)"
        yield f"LoRA of rank {rank} on {on}: {_count(plan.trained_count)} parameters"
    else:
        yield "Full fine-tuning, float32"
    training = f"{gb(plan.state_bytes)} with the optimizer's state"
    yield f"  a checkpoint     {gb(plan.weights_bytes)} for sampling, {training}"
    kept = plan.activations
    yield (
        f"  a token keeps    {_kb(kept.plain_bytes)} for the backward pass, "
        f"{_kb(kept.recomputed_bytes)} with recomputation"
    )


def _stages(plan: Plan) -> Iterator[str]:
    ranks = plan.machine.gpus
    yield f"What each of {ranks} rank(s) keeps, in GB (LoRA over a base in {plan.wanted.dtype}):"
    yield "  stage |" + "".join(f"{kind:^50}|" for kind in ("LoRA", "full fine-tuning"))
    columns = ("base", "values", "optimizer", "gradients", "all")
    yield "        |" + ("".join(f"{name:>10}" for name in columns) + "|") * 2
    for stage in range(4):
        cells = ""
        for kind in ("lora", "full"):
            rank = plan.stages[kind][stage]
            parts = (rank.base, rank.values, rank.optimizer, rank.gradients, rank.kept)
            cells += "".join(f"{part / GB:>10,.2f}" for part in parts) + "|"
        yield f"  {stage:>5} |{cells}"


def _layout(plan: Plan) -> Iterator[str]:
    layout = plan.layout
    if layout is None:
        return
    where = f"{layout.ranks} rank(s), {layout.ranks_per_host} on a host"
    offload = ", offload" if layout.offload else ""
    yield f"Recommended: ZeRO stage {layout.stage}{offload}, {where}"
    gpu = f"{gb(plan.machine.gpu_bytes)} ({gb(plan.machine.usable_bytes)} usable)"
    yield f"  GPU memory       {gb(layout.kept_bytes)} kept of {gpu}; {gb(layout.room_bytes)} left"
    yield "                   for activations while a call computes"
    tokens = min(layout.plain_tokens, MICRO_BATCH_TOKENS_MAX)
    how = f"of up to {tokens:,} tokens"
    if layout.plain_tokens < MICRO_BATCH_TOKENS_MAX:
        how += "; a longer datum goes alone, with recomputation"
    else:
        how += f" (micro_batch_tokens_max; memory would hold {layout.plain_tokens:,})"
    yield f"  micro-batch      {how}"
    spread = layout.sequence_parallel
    how = "with recomputation" if spread == 1 else f"on {spread} ranks, with recomputation"
    yield f"  longest datum    about {layout.datum_tokens_max:,} tokens, {how}"
    yield f"  host memory      {gb(layout.host_bytes)} on each host"
    yield f"  /dev/shm         {gb(layout.shm_bytes)} on each host"
    yield "  settings         " + " ".join(_settings(plan, layout))


def _settings(plan: Plan, layout: Layout) -> Iterator[str]:
    here = layout.ranks_per_host
    yield f"TINSMITH_TRAINER_RANKS={here}" if here == layout.ranks else f"torchrun of {here} each,"
    yield f"TINSMITH_TRAINER_DTYPE={plan.wanted.dtype}"
    yield f"TINSMITH_TRAINER_ZERO_STAGE={layout.stage}"
    if layout.offload:
        yield "TINSMITH_TRAINER_OFFLOAD=true"
    if layout.sequence_parallel > 1:
        yield f"TINSMITH_TRAINER_SEQUENCE_PARALLEL={layout.sequence_parallel}"
    if layout.activation_bytes_max:
        yield f"TINSMITH_TRAINER_ACTIVATION_BYTES_MAX={layout.activation_bytes_max}"


def _disks(plan: Plan) -> Iterator[str]:
    yield f"  base models      {gb(plan.base_files_bytes)} on their volume"
    models = f"{plan.wanted.models} model(s)"
    yield f"  training         {gb(plan.snapshots_bytes)} of snapshots for {models}, and their"
    yield "                   journal (journal_bytes_max)"
    if plan.sampler_tokens:
        room = f"{plan.sampler_tokens:,} tokens of {_kb(plan.kv_bytes)} fit beside it"
        yield f"  a Sampler        {gb(plan.sampler_bytes)} on one GPU; {room}"
    else:
        yield (
            f"  a Sampler        {gb(plan.sampler_bytes)}: more than one GPU, so engine vllm "
            "with vllm_tensor_parallel_size"
        )


def _count(number: int) -> str:
    if number >= GB:
        return f"{number / GB:,.2f} billion"
    return f"{number / 1_000_000:,.1f} million"


def _kb(number: int) -> str:
    return f"{number / 1000:,.0f} kB"
