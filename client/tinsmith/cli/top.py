"""`tinsmith top`: what a cluster is at, again and again."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from rich.live import Live

from tinsmith.cli.access import PAGE_SIZE, Access
from tinsmith.cli.command import Session, command
from tinsmith.cli.metrics import Scrape, scrape
from tinsmith.cli.output import Cell, pairs_of, stacked, table_of, word
from tinsmith.cli.records import Record, model_record, step_record
from tinsmith.cli.status import model_counts
from tinsmith.cli.text import now, since
from tinsmith.v1 import training_service_pb2 as pb

WINDOW_S = 60.0
"""Steps of so long count for the rates of models."""
STEPS_MAX = 200
_COLUMNS = (
    *("MODEL", "BASE MODEL", "STATE", "STEPS", "WAITING"),
    *("STEPS/MIN", "TOKENS/S", "LOSS", "LAST CALL"),
)
_TRAINED = "tinsmith_training_computed_tokens_total"
_SAMPLED = "tinsmith_sampler_sampled_tokens_total"
_READ = "tinsmith_sampler_prompt_tokens_computed_total"
_KV = "tinsmith_sampler_kv_tokens"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "top")(top)


def top(
    session: Session,
    once: Annotated[bool, typer.Option("--once", help="Show it once.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Between two looks.")
    ] = 2.0,
    models: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Models to show.")] = 20,
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A server's metrics_address; may be repeated."),
    ] = None,
) -> None:
    """Show models, what waits, and tokens per second, until Ctrl-C.

    Models that were called last come first; their rates are those of their steps in the last
    minute. What the servers compute is in their metrics, which --metrics reads. Where standard
    output is no terminal it shows everything once; with --json it prints a line for each look.
    """
    frames = _frames(session.access, list(metrics or []), models)
    if session.out.as_json:
        session.out.json_line(next(frames).record())
        while not once:
            time.sleep(interval)
            session.out.json_line(next(frames).record())
        return
    if once or not session.out.console.is_terminal:
        session.out.console.print(_shown(next(frames)))
        return
    with Live(_shown(next(frames)), console=session.out.console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_shown(next(frames)), refresh=True)


@dataclass
class Frame:
    """One look at a cluster.

    Attributes:
        address: Of the cluster.
        counts: Models, by state too, and calls that wait.
        models: Records of models, with `steps_per_minute`, `tokens_per_second` and `loss`.
        servers: What metrics say, one record for each address.
        moment: When it was taken.
    """

    address: str
    counts: Record
    models: Sequence[Record]
    servers: Sequence[Record] = field(default_factory=list)
    moment: datetime = field(default_factory=now)

    def record(self) -> Record:
        """As `--json` has it."""
        return {
            "time": self.moment.isoformat(timespec="milliseconds"),
            "address": self.address,
            "models_total": self.counts["models"],
            "models_by_state": self.counts["models_by_state"],
            "pending_calls": self.counts["pending_calls"],
            "models": self.models,
            "servers": self.servers,
        }


def _frames(access: Access, addresses: Sequence[str], most: int) -> Iterator[Frame]:
    before: dict[str, Scrape] = {}
    while True:
        frame = access.run(_look(access, most))
        scrapes = [scrape(address) for address in addresses]
        frame.servers = [_server(each, before.get(each.address)) for each in scrapes]
        before = {each.address: each for each in scrapes}
        yield frame


async def _look(access: Access, most: int) -> Frame:
    page = await access.answer(pb.ListModelsRequest(page_size=PAGE_SIZE))
    newest = sorted(page.models, key=lambda model: model.last_request_time.seconds, reverse=True)
    # A suspended model, or one that nobody calls, makes no steps.
    records = await asyncio.gather(*(_model(access, model) for model in newest[:most]))
    return Frame(access.address, model_counts(page), records)


async def _model(access: Access, model: pb.Model) -> Record:
    record = dict(model_record(model))
    record |= {"steps_per_minute": 0.0, "tokens_per_second": 0.0, "loss": None}
    seen = now() - timedelta(seconds=WINDOW_S)
    if not record["last_request_time"] or not _after(record["last_request_time"], seen):
        return record
    asked = pb.ListStepsRequest(model_id=model.model_id, page_size=STEPS_MAX)
    steps = [step_record(step) for step in (await access.answer(asked)).steps]
    recent = [step for step in steps if step["create_time"] and _after(step["create_time"], seen)]
    tokens = sum(step["metrics"].get("tokens:sum", 0.0) for step in recent)
    record["steps_per_minute"] = len(recent) * 60.0 / WINDOW_S
    record["tokens_per_second"] = tokens / WINDOW_S
    if steps:
        record["loss"] = steps[0]["metrics"].get("loss:sum")
    return record


def _after(moment: str, seen: datetime) -> bool:
    return datetime.fromisoformat(moment) >= seen


def _server(found: Scrape, before: Scrape | None) -> Record:
    """What is of interest in a server's metrics; None for what it does not have."""
    return {
        "metrics": found.address,
        "ranks": found.sum("tinsmith_training_ranks"),
        "trained_tokens_per_second": found.rate(before, _TRAINED),
        "sampled_tokens_per_second": found.rate(before, _SAMPLED),
        "read_tokens_per_second": found.rate(before, _READ),
        "requests_running": found.sum("tinsmith_sampler_requests_running"),
        "requests_waiting": found.sum("tinsmith_sampler_requests_waiting"),
        "adapters": found.sum("tinsmith_sampler_adapters"),
        "kv_tokens": found.sum(_KV),
        "kv_tokens_max": found.sum(f"{_KV}_max"),
        "memory_bytes": found.sum("process_resident_memory_bytes"),
    }


def _shown(frame: Frame) -> Any:
    states = ", ".join(f"{n} {state}" for state, n in frame.counts["models_by_state"].items())
    facts: list[tuple[str, Cell]] = [
        (frame.address, frame.moment.strftime("%H:%M:%S UTC")),
        ("Models", f"{frame.counts['models']:,}" + (f" ({states})" if states else "")),
        ("Calls that wait", frame.counts["pending_calls"]),
    ]
    rows: list[list[Cell]] = [
        [
            model["model_id"],
            model["base_model"],
            word(model["state"]),
            model["step_count"],
            model["pending_calls"],
            f"{model['steps_per_minute']:.0f}",
            f"{model['tokens_per_second']:,.1f}",
            "" if model["loss"] is None else f"{model['loss']:,.4f}",
            since(model["last_request_time"], frame.moment),
        ]
        for model in frame.models
    ]
    parts = [pairs_of(facts), table_of(_COLUMNS, rows)]
    if frame.servers:
        parts.append(table_of(*_of_metrics(frame.servers)))
    return stacked(*parts)


def _of_metrics(servers: Sequence[Record]) -> tuple[Sequence[str], list[list[Cell]]]:
    """A table of the columns that some server has values for."""
    titles = {
        "ranks": "RANKS",
        "trained_tokens_per_second": "TRAINED/S",
        "sampled_tokens_per_second": "SAMPLED/S",
        "read_tokens_per_second": "READ/S",
        "requests_running": "RUNNING",
        "requests_waiting": "WAITING",
        "adapters": "ADAPTERS",
        "kv_tokens": "KV TOKENS",
        "kv_tokens_max": "OF",
        "memory_bytes": "MEMORY MB",
    }
    had = [key for key in titles if any(server[key] is not None for server in servers)]

    def shown(server: Record, key: str) -> Cell:
        value = server[key]
        if value is None:
            return ""
        return f"{value / 1e6:,.0f}" if key == "memory_bytes" else f"{value:,.0f}"

    rows = [[server["metrics"], *(shown(server, key) for key in had)] for server in servers]
    return ("METRICS AT", *(titles[key] for key in had)), rows
