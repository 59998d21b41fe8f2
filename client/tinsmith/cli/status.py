"""`tinsmith status`: is all of a cluster there, and what is it at."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from tinsmith._connection import TRAINING
from tinsmith.cli.access import PAGE_SIZE, Access
from tinsmith.cli.command import Session, command
from tinsmith.cli.failures import WRONG
from tinsmith.cli.output import Cell, pairs_of, stacked, table_of, word
from tinsmith.cli.records import Record, word_of
from tinsmith.cli.servers import SERVING, Server, all_servers
from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "status")(status)


def status(session: Session) -> None:
    """Show the servers, what they serve, and what waits.

    Ends with status 1 where a server does not serve, and 3 where the Training server is away.
    """
    servers, counts = session.access.run(_everything(session.access))
    training = next(server for server in servers if server.service == TRAINING)
    document = {
        "address": session.access.address,
        "servers": [server.record() for server in servers],
        "ranks": getattr(training.capabilities, "world_size", 0),
        "durability": _durability(training),
        **counts,
    }
    if session.out.as_json:
        session.out.json(document)
    else:
        session.out.console.print(
            stacked(_servers(servers), _base_models(training), pairs_of(_facts(document)))
        )
    if any(server.health != SERVING for server in servers):
        raise typer.Exit(WRONG)


async def _everything(access: Access) -> tuple[list[Server], dict[str, Any]]:
    servers = await all_servers(access)
    models = training_service_pb2.ListModelsRequest(page_size=PAGE_SIZE)
    checkpoints = checkpoint_service_pb2.ListCheckpointsRequest(page_size=1)
    here = {server.service for server in servers if server.capabilities is not None}
    counts: dict[str, Any] = {}
    if TRAINING in here:
        counts |= model_counts(await access.answer(models))
    if "checkpoint" in here:
        counts["checkpoints"] = (await access.answer(checkpoints)).total_size
    return servers, counts


def model_counts(page: training_service_pb2.ListModelsResponse) -> Mapping[str, Any]:
    """What a page of models says of all; pending calls are those of the models on it."""
    states = Counter(word_of(training_service_pb2.ModelState, m.state) for m in page.models)
    return {
        "models": page.total_size,
        "models_by_state": dict(states),
        "pending_calls": sum(model.pending_calls for model in page.models),
    }


def _durability(training: Server) -> str:
    mode = getattr(training.capabilities, "durability_mode", 0)
    return word_of(training_service_pb2.DurabilityMode, mode)


def _servers(servers: Sequence[Server]) -> Any:
    columns = ("SERVER", "ADDRESS", "HEALTH", "VERSION", "ENGINE", "ANSWERS IN", "")
    rows: list[Sequence[Cell]] = [
        (
            server.service,
            server.address,
            word(server.health),
            server.version,
            server.engine,
            f"{server.answer_ms:.1f} ms" if server.version else "",
            server.problem,
        )
        for server in servers
    ]
    return table_of(columns, rows)


def _base_models(training: Server) -> Any:
    columns = ("BASE MODEL", "PARAMETERS", "CONTEXT", "DTYPE", "ARCHITECTURE")
    keys = ("name", "parameter_count", "context_length", "dtype", "architecture")
    return table_of(columns, [[model[key] for key in keys] for model in training.base_models])


def _facts(document: Record) -> list[tuple[str, Cell]]:
    states = ", ".join(f"{n} {state}" for state, n in document.get("models_by_state", {}).items())
    models = f"{document.get('models', 0):,}" + (f" ({states})" if states else "")
    return [
        ("Ranks", document["ranks"]),
        ("Durability", document["durability"]),
        ("Models", models),
        ("Calls that wait", document.get("pending_calls", 0)),
        ("Checkpoints", document.get("checkpoints", 0)),
    ]
