"""What the Checkpoint server refuses of names and streams: nothing is left behind."""

import itertools
from collections.abc import Callable

import grpc
import pytest

from checkpoint_server import Served
from checkpoints import PATH, files, messages, piece
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmithd.checkpoint.store.spool import KEPT_BYTES
from waiting import until
from wire import reason_and_field

BAD_PATHS = [
    "",
    "tinsmith://run/weights/..",
    "/etc/passwd",
    "tinsmith://../weights/a",
    "tinsmith://run/weights/a/b",
    "tinsmith://run/weights/a\0b",
    "tinsmith://run/weights/" + "a" * 4096,
    "tinsmith://run/weights/ä",
    "tinsmith://run/other/a",
    "s3://run/weights/a",
]


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_bad_names_are_refused_by_every_call(served: Served, path: str) -> None:
    """Names are data: nothing that looks like a path gets anywhere."""
    calls: list[Callable[[], object]] = [
        lambda: served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=path)),
        lambda: served.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(checkpoint_path=path)),
        lambda: served.read(path),
        lambda: served.write(path),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call()  # type: ignore[misc]
        assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        reason, field = reason_and_field(refusal.value)
        assert reason in ("INVALID_NAME", "MISSING_FIELD")
        assert field.endswith("path")
    assert served.leftovers() == []


def _streams() -> dict[str, tuple[list[pb.WriteCheckpointRequest], str, str]]:
    content = files()
    good = list(messages(PATH, content))
    header, pieces, end = good[0], good[1:-1], good[-1]
    first = pieces[0].piece
    bad_json = {**content, "adapter_config.json": b"[]"}
    bad_tensors = {**content, "adapter_model.safetensors": b"\x80\x04pickle" * 9}
    return {
        "no message": ([], "MALFORMED_STREAM", "header"),
        "no header": ([*pieces, end], "MALFORMED_STREAM", "header"),
        "two headers": ([header, header, end], "MALFORMED_STREAM", "header"),
        "no commit": ([header, *pieces], "MALFORMED_STREAM", "commit"),
        "after the commit": ([*good, pieces[0]], "MALFORMED_STREAM", "commit"),
        "hole": (
            [header, piece(first.file_name, 7, b"x"), end],
            "MALFORMED_STREAM",
            "piece.offset",
        ),
        "unset message": (
            [header, pb.WriteCheckpointRequest(), end],
            "MALFORMED_STREAM",
            "content",
        ),
        "bad checksum": ([header, piece(first.file_name, 0, b"x", 1)], "CHECKPOINT_CORRUPT", ""),
        "lost piece": ([header, *pieces[:-1], end], "MALFORMED_STREAM", "commit.files"),
        "other bytes": (
            [*list(messages(PATH, files(1)))[:-1], end],
            "CHECKPOINT_CORRUPT",
            "",
        ),
        "unknown file": ([header, piece("../x", 0, b"x")], "INVALID_NAME", "piece.file_name"),
        "pickle": (
            list(messages(PATH, bad_tensors)),
            "INVALID_FIELD",
            'commit.files["adapter_model.safetensors"]',
        ),
        "no json object": (
            list(messages(PATH, bad_json)),
            "INVALID_FIELD",
            'commit.files["adapter_config.json"]',
        ),
        "missing file": (
            list(messages(PATH, {"adapter_config.json": b"{}"})),
            "MISSING_FIELD",
            'commit.files["model_state.json"]',
        ),
        "optimizer in a sampler checkpoint": (
            list(messages(PATH.replace("/weights/", "/sampler_weights/"), content)),
            "INVALID_NAME",
            "piece.file_name",
        ),
        "big piece": (
            [header, piece(first.file_name, 0, b"x" * 5_000_000)],
            "LIMIT_EXCEEDED",
            "piece.data",
        ),
    }


@pytest.mark.parametrize("case", sorted(_streams()))
async def test_a_bad_stream_is_refused_and_leaves_nothing(served: Served, case: str) -> None:
    """Typed error, exact field, no staging left, and the next good write works."""
    stream, reason, field = _streams()[case]
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await served.send(stream)
    assert reason_and_field(refusal.value) == (reason, field)
    assert served.leftovers() == []
    await served.write()
    assert await served.read() == files()


async def test_a_broken_stream_leaves_nothing(served: Served) -> None:
    """A writer that goes away half-way was never there."""
    call = served.stub.WriteCheckpoint()
    for message in itertools.islice(messages(PATH, files(columns=KEPT_BYTES)), 20):
        await call.write(message)
    await until(served.leftovers)
    call.cancel()
    await until(lambda: not served.leftovers())
    assert served.blobs() == []
