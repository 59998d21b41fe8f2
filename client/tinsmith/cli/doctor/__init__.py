"""`tinsmith doctor`: what is wrong with a set-up, from this machine to the cluster's servers."""

from pathlib import Path
from typing import Annotated

import typer

from tinsmith.cli import failures
from tinsmith.cli.command import Session, command
from tinsmith.cli.doctor import local, model_folder, remote
from tinsmith.cli.doctor.findings import OK, SKIPPED, WARNING, WRONG, Finding
from tinsmith.cli.output import Cell, word


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "doctor")(doctor)


def doctor(
    session: Session,
    base_model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also look at this base model.")
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where `tinsmith up` keeps all data.")
    ] = Path("tinsmith-data"),
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A metrics_address, to compare clocks exactly."),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Look at this machine alone, not at a cluster.")
    ] = False,
) -> None:
    """Look for what is wrong with a set-up.

    That is this machine, the way to the cluster, its servers, and a base model. Changes nothing.
    Ends with status 1 where something is wrong.
    """
    found = [*local.all_findings(data)]
    found.append(
        model_folder.finding(base_model)
        if base_model is not None
        else Finding("base model", SKIPPED, "--base-model FOLDER looks at one")
    )
    if not here:
        found += remote.all_findings(session, list(metrics or []))
    if session.out.as_json:
        session.out.json({"findings": [finding.record() for finding in found]})
    else:
        _print(session, found)
    if any(finding.state == WRONG for finding in found):
        raise typer.Exit(failures.WRONG)


def _print(session: Session, found: list[Finding]) -> None:
    rows: list[list[Cell]] = []
    for finding in found:
        rows.append([word(finding.state), finding.check, finding.found])
        if finding.hint:
            rows.append(["", "", f"-> {finding.hint}"])
    session.out.table(("", "CHECK", "FOUND"), rows)
    counts = {state: sum(f.state == state for f in found) for state in (OK, WARNING, WRONG)}
    session.out.note(", ".join(f"{count} {state}" for state, count in counts.items() if count))
