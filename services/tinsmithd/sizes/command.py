"""`tinsmith plan`: what a base model takes, and how to spread it, before anything is loaded.

Reads `config.json` alone, and needs neither torch nor a server. Ends with status 1 and a sentence
where the model does not fit.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tinsmithd.sizes.architecture import BYTES_OF_DTYPE, Unreadable, read_architecture
from tinsmithd.sizes.plan import GB, MICRO_BATCH_TOKENS_MAX, Machine, Wanted, make_plan
from tinsmithd.sizes.report import document, text
from tinsmithd.tunings import FullConfig, LoraConfig, Tuning


def _whole(argument: str) -> int:
    number = int(argument)
    if not 1 <= number <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{argument} is not between 1 and {1 << 20}")
    return number


def _gigabytes(argument: str) -> int:
    number = float(argument)
    if not (math.isfinite(number) and 0 < number <= 1e6):
        raise argparse.ArgumentTypeError(f"{argument} is not between 0 and a million GB")
    return int(number * GB)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinsmith plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, lora, machine = parser.add_argument, LoraConfig(), Machine()
    add("model", type=Path, help="folder of the base model, or its config.json")
    add("--gpus", type=_whole, metavar="N", help="GPUs; else the fewest that suffice")
    add(
        "--gpu-memory",
        type=_gigabytes,
        metavar="GB",
        default=machine.gpu_bytes,
        help="memory of a GPU; 80",
    )
    add(
        "--gpus-per-host",
        type=_whole,
        metavar="N",
        default=machine.gpus_per_host,
        help=f"GPUs of a host; {machine.gpus_per_host}",
    )
    add("--host-memory", type=_gigabytes, metavar="GB", help="memory of a host, to check it too")
    add("--full", action="store_true", help="train all weights instead of an adapter")
    add("--rank", type=_whole, default=lora.rank, help=f"LoRA rank; {lora.rank}")
    add(
        "--expert-rank",
        type=_whole,
        metavar="RANK",
        default=lora.expert_rank,
        help="LoRA rank on each expert; the rank / experts that a token passes through",
    )
    for part in ("attn", "mlp", "unembed"):
        add(
            f"--train-{part}",
            action=argparse.BooleanOptionalAction,
            default=getattr(lora, f"train_{part}"),
            help="as in create_lora_training_client",
        )
    add("--dtype", choices=list(BYTES_OF_DTYPE), default="bfloat16", help="of the frozen base")
    add("--models", type=_whole, metavar="N", default=1, help="models that train at once; 1")
    add(
        "--tokens",
        type=_whole,
        default=MICRO_BATCH_TOKENS_MAX,
        help=f"tokens of the longest datum; {MICRO_BATCH_TOKENS_MAX}",
    )
    add("--zero-stage", type=int, choices=range(4), help="this ZeRO stage, not the quickest")
    add("--offload", action=argparse.BooleanOptionalAction, help="offload, or not")
    add("--json", action="store_true", help="print JSON, in bytes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tinsmith plan`.

    Args:
        argv: What follows `plan`; None means `sys.argv[1:]`.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    tuning: Tuning = FullConfig()
    if not options.full:
        parts = {f"train_{p}": getattr(options, f"train_{p}") for p in ("attn", "mlp", "unembed")}
        tuning = LoraConfig(rank=options.rank, expert_rank=options.expert_rank, **parts)
        if problem := tuning.problem():
            parser.error(problem)
    if options.offload and options.zero_stage == 0:
        parser.error("--offload moves what ZeRO partitions: it needs stage 1 or more")
    machine = Machine(options.gpus, options.gpu_memory, options.gpus_per_host, options.host_memory)
    wanted = Wanted(
        tuning,
        options.dtype,
        options.models,
        options.tokens,
        options.zero_stage,
        options.offload,
    )
    try:
        model = read_architecture(options.model)
    except Unreadable as error:
        sys.exit(f"tinsmith: {error}")
    if options.tokens > model.context_length:
        parser.error(f"--tokens: {model.name} was made for {model.context_length:,} tokens")
    if options.full and options.models > 1:
        parser.error("--full: a model that trains all weights has the ranks for itself")
    if options.expert_rank and not model.experts_of_token:
        parser.error(f"--expert-rank: {model.name} has no experts")
    plan = make_plan(model, machine, wanted)
    print(json.dumps(document(plan), indent=2) if options.json else text(plan))
    if plan.refusal:
        sys.exit(f"tinsmith: {plan.refusal}")
