"""Row `store`: a durable save into an object store beside a plain put of the same bytes."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import obstore
from obstore.store import S3Store

import object_stores
from bench.harness import Agreement, Result, Side, measure, middle, ratio
from bench.sides import Settings
from checkpoints import PATH, ServerProcess, files, messages
from object_stores import BUCKET, SeaweedFS
from tinsmith import v1 as pb

STORE_TARGET = 1.3
COLUMNS = 2_000_000
"""Of the adapter: with its moments 96 MB."""
PIECE_BYTES = 1 << 20


def store(settings: Settings) -> list[Result]:
    """From a client's first byte until its checkpoint is durable and visible in SeaweedFS, beside
    one put of all its bytes at once by obstore, which has them in memory.

    Both go to one SeaweedFS on this machine. The save also sends its bytes to the Checkpoint
    server, which spools, hashes and checks them, and commits.
    """
    content = files(1, columns=COLUMNS)
    joined = b"".join(content.values())
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = stack.enter_context(object_stores.seaweedfs(scratch / "seaweedfs"))
        place = running.place()
        server = stack.enter_context(ServerProcess(scratch / "server", place=place))
        plain, names = _plain(running), itertools.count()
        sent = [list(messages("", content, piece_bytes=PIECE_BYTES))]

        def save() -> None:
            header, *rest = sent[0]
            header.header.checkpoint_path = f"{PATH}-{next(names)}"
            server.stub.WriteCheckpoint(_each(header, rest), timeout=300)

        def put() -> None:
            obstore.put(plain, f"plain/{next(names)}", joined)

        sides = [Side("durable save", save), Side("raw put", put)]
        timings = measure(sides, max(settings.pairs, 3))
        (newest, *_) = server.paths()
        same = server.read(newest) == content
    middles = {name: middle(found) for name, found in timings.items()}
    return [
        Result(
            "store",
            f"{len(joined) / 1e6:.0f} MB, durable save / raw put",
            ratio(timings["durable save"], timings["raw put"]),
            target=STORE_TARGET,
            sides=middles,
            agreement=Agreement(0.0 if same else float("nan"), 0.0),
            notes="SeaweedFS on this machine",
        )
    ]


def _plain(running: SeaweedFS) -> S3Store:
    return S3Store(BUCKET, client_options={"allow_http": True}, **running.options)


def _each(
    header: pb.WriteCheckpointRequest, rest: list[pb.WriteCheckpointRequest]
) -> Iterator[pb.WriteCheckpointRequest]:
    yield header
    yield from rest
