"""`tinsmith models`: what trains."""

from typing import Annotated

import typer

from tinsmith.cli.command import Session, Yes, command
from tinsmith.cli.complete import model_ids
from tinsmith.cli.output import Cell, word
from tinsmith.cli.records import Record, model_record, step_record, tuning_text
from tinsmith.cli.text import counted, now, since
from tinsmith.v1 import training_service_pb2 as pb

app = typer.Typer(help="Models that train: list, look at, delete.", rich_markup_mode=None)

LIST_MAX = 1_000_000
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="Its id.", autocompletion=model_ids)]
ModelIds = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Their ids.", autocompletion=model_ids)
]
Limit = Annotated[int, typer.Option(metavar="N", min=1, max=LIST_MAX, help="The newest N.")]


@command(app, "ls")
def ls(session: Session, limit: Limit = 100) -> None:
    """List models, newest first."""
    request = pb.ListModelsRequest()
    records = [model_record(m) for m in session.access.pages(request, "models", limit)]
    if session.out.as_json:
        session.out.json({"models": records})
        return
    columns = ("MODEL", "BASE MODEL", "TUNING", "STATE", "STEPS", "WAITING", "LAST CALL")
    session.out.table(columns, [_row(record) for record in records])
    session.out.note(counted(len(records), "model"))


def _row(record: Record) -> list[Cell]:
    return [
        record["model_id"],
        record["base_model"],
        tuning_text(record["tuning"]),
        word(record["state"]),
        record["step_count"],
        record["pending_calls"],
        since(record["last_request_time"] or record["create_time"], now()),
    ]


@command(app, "show")
def show(
    session: Session,
    model: ModelId,
    steps: Annotated[
        int, typer.Option(metavar="N", min=0, max=1000, help="The newest N steps.")
    ] = 5,
) -> None:
    """Show all that is known of a model, and its newest optimizer steps."""
    record = model_record(session.access.ask(pb.GetModelRequest(model_id=model)).model)
    asked = pb.ListStepsRequest(model_id=model)
    made = [step_record(step) for step in session.access.pages(asked, "steps", steps)]
    if session.out.as_json:
        session.out.json(dict(record) | {"steps": made})
        return
    session.out.pairs(_facts(record))
    if made:
        session.out.console.print()
        columns = ("STEP", "CALL", "WHEN", "LOSS", "TOKENS", "GRAD NORM", "LR")
        session.out.table(columns, [_step(step) for step in made])


def _facts(record: Record) -> list[tuple[str, Cell]]:
    tuning = {key: value for key, value in record["tuning"].items() if key != "kind"}
    facts: list[tuple[str, Cell]] = [
        ("Model", record["model_id"]),
        ("Owner", record["owner"]),
        ("Base model", record["base_model"]),
        ("Tuning", record["tuning"]["kind"]),
        *((f"  {key}", str(value)) for key, value in tuning.items()),
        ("State", word(record["state"])),
    ]
    if record["state_message"]:
        facts.append(("", record["state_message"]))
    return [
        *facts,
        ("Steps", record["step_count"]),
        ("Calls that wait", record["pending_calls"]),
        ("Next call", record["next_seq_id"]),
        ("Created", record["create_time"] or ""),
        ("Last call", record["last_request_time"] or ""),
        *((f"  {key}", value) for key, value in record["user_metadata"].items()),
    ]


def _step(step: Record) -> list[Cell]:
    metrics = step["metrics"]

    def shown(name: str, form: str) -> str:
        return format(metrics[name], form) if name in metrics else ""

    return [
        step["step_count"],
        step["seq_id"],
        since(step["create_time"], now()),
        shown("loss:sum", ",.4f"),
        shown("tokens:sum", ",.0f"),
        shown("grad_norm:last", ".4g"),
        shown("learning_rate:last", ".3g"),
    ]


@command(app, "rm")
def rm(session: Session, models: ModelIds, yes: Yes = False) -> None:
    """Delete models: what trains, with its optimizer state. Checkpoints stay.

    Calls of theirs that were not answered yet fail.
    """
    session.out.confirm(f"Delete {', '.join(models)}, which cannot be undone?", yes=yes)
    deleted = []
    for model in models:
        session.access.wait(session.access.rest.delete_model(model))
        deleted.append(model)
        session.out.note(f"deleted {model}")
    if session.out.as_json:
        session.out.json({"deleted": deleted})
