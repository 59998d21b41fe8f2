"""The tables of `docs/sizes.md`, made of the formulas; `make sizes` writes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from busy_share import CALLS, DATA_PER_RANK, busy_share
from busy_share import RANKS as RANK_NUMBERS
from tinsmithd.sizes import Architecture, Machine, Plan, Wanted, make_plan, read_architecture
from tinsmithd.sizes.plan import GB
from tinsmithd.tunings import FullConfig, LoraConfig

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "sizes.md"
BEGIN, END = "<!-- tables: begin; `make sizes` writes them -->", "<!-- tables: end -->"
NAMES = ("Qwen3-8B", "Qwen3-30B-A3B", "Llama-3.1-70B", "Qwen3-235B-A22B")
RANKS = 8
ATTENTION = LoraConfig(train_mlp=False)
GPUS = (80, 141)


def architecture(name: str) -> Architecture:
    """One of the published ones."""
    return read_architecture(ROOT / "tests" / "architectures" / f"{name}.json")


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    body = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in body) for column in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in body
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _parameters() -> Iterator[Sequence[str]]:
    for name in NAMES:
        plan = make_plan(architecture(name), Machine(RANKS), Wanted())
        attention = make_plan(architecture(name), Machine(RANKS), Wanted(ATTENTION))
        yield (
            name,
            f"{plan.parameter_count / GB:,.2f}",
            f"{plan.active_parameter_count / GB:,.2f}",
            f"{plan.adapter_parameter_count / 1e6:,.0f}",
            f"{attention.adapter_parameter_count / 1e6:,.0f}",
            f"{plan.weights_bytes / GB:,.2f} / {plan.state_bytes / GB:,.2f}",
            f"{plan.activations.plain_bytes / 1000:,.0f}",
            f"{plan.activations.recomputed_bytes / 1000:,.0f}",
            f"{plan.kv_bytes / 1000:,.0f}",
        )


def _kept() -> Iterator[Sequence[str]]:
    for name in NAMES:
        plan = make_plan(architecture(name), Machine(RANKS), Wanted())
        lora, full = ([plan.stages[kind][s] for s in (0, 1, 3)] for kind in ("lora", "full"))
        yield (
            name,
            *(f"{rank.kept / GB:,.1f}" for rank in lora),
            *(f"{rank.kept / GB:,.1f}" for rank in full),
        )


def _layouts() -> Iterator[Sequence[str]]:
    for name in NAMES:
        model = architecture(name)
        kinds = [("LoRA", LoraConfig()), ("LoRA, attention and head", ATTENTION)]
        kinds = kinds if model.expert_count else kinds[:1]
        for kind, tuning in [*kinds, ("full", FullConfig())]:
            plans = [make_plan(model, Machine(RANKS, gb * GB), Wanted(tuning)) for gb in GPUS]
            yield (name, kind, *map(_verdict, plans))


def _verdict(plan: Plan) -> str:
    layout = plan.layout
    if layout is None:
        return "no: " + plan.refusal.rpartition(" can be used: ")[2]
    offload = " with offload" if layout.offload else ""
    kept = f"{layout.kept_bytes / GB:,.0f} GB kept"
    tokens = f"{layout.plain_tokens:,} tokens plain, a datum of {layout.datum_tokens_max:,}"
    spread = layout.sequence_parallel
    tokens += f" on {spread} ranks" if spread > 1 else ""
    return f"stage {layout.stage}{offload}: {kept}, {tokens}"


def _busy() -> Iterator[Sequence[str]]:
    for in_step, stage in ((False, "0 to 2"), (True, "3")):
        for ranks in RANK_NUMBERS:
            shares = (busy_share(call[ranks], ranks, in_step=in_step) for call in CALLS.values())
            yield (stage, str(ranks), *(f"{100 * share:.0f} %" for share in shares))


def tables() -> str:
    """All of them, as Markdown."""
    return "\n\n".join(
        (
            _table(
                (
                    "Model",
                    "parameters, billions",
                    "active",
                    "adapter of rank 32, millions",
                    "the same without MLP",
                    "its checkpoint, for sampling / training, GB",
                    "a token keeps, kB",
                    "with recomputation, kB",
                    "KV of a token, kB",
                ),
                _parameters(),
            ),
            f"What each of {RANKS} ranks keeps, in GB (stage 2 is as stage 1):",
            _table(
                (
                    "Model",
                    *(f"LoRA, stage {s}" for s in (0, 1, 3)),
                    *(f"full, stage {s}" for s in (0, 1, 3)),
                ),
                _kept(),
            ),
            f"What fits on {RANKS} GPUs today, with data of 2,048 tokens:",
            _table(("Model", "Tuning", *(f"GPUs of {gb} GB" for gb in GPUS)), _layouts()),
            f"How busy ranks are with {DATA_PER_RANK} data each, by tokens of a datum:",
            _table(("ZeRO stage", "ranks", *CALLS), _busy()),
        )
    )


def drawn() -> str:
    """The document as it should be."""
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(drawn())
