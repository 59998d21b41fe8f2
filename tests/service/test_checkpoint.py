"""The Checkpoint server through the wire: life cycle and bad input. Crashes are in `faults`."""

import asyncio
import io
import tarfile

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from safetensors.numpy import load

from checkpoint_server import Served
from checkpoints import PATH, files, messages, to_files
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.checkpoint.rules import EXPIRY_GRACE_S
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.checkpoint.store import StoreBusy
from tinsmithd.config import CheckpointConfig
from tinsmithd.domain import FullConfig, ModelState
from waiting import until
from wire import reason_and_field, unlimited

SAMPLER_PATH = "tinsmith://run/sampler_weights/one"


async def test_what_was_written_is_read_back(served: Served) -> None:
    """All files come back byte for byte, with everything that the header said."""
    written = await served.write(user_metadata={"k": "v"})
    assert await served.read() == files()
    response = await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=PATH))
    assert response.checkpoint == written
    assert written.checkpoint_path == PATH
    assert written.kind == types_pb2.CHECKPOINT_KIND_TRAINING
    assert written.user_metadata == {"k": "v"}
    assert (written.step_count, written.owner) == (3, "default")
    assert written.size_bytes == sum(map(len, files().values()))
    await until(lambda: not served.leftovers())  # it is cleared away behind the answer


async def test_tinker_paths_name_the_same_checkpoint(served: Served) -> None:
    """`tinker://` is an alias in requests."""
    await served.write("tinker://run/weights/one")
    assert await served.read("tinker://run/weights/one") == await served.read(PATH)


async def test_only_the_same_write_is_a_repeat(served: Served) -> None:
    """The same request changes nothing. The same files in another request are refused, as are
    other files, and what was there keeps its files, lifetime and metadata."""
    said = {"ttl": Duration(seconds=60), "user_metadata": {"k": "v"}}
    first = await served.write(**said, request_id="one")
    served.clock.now_s += 5
    assert await served.write(**said, request_id="one") == first
    others: list[tuple[dict[str, object], str]] = [
        (said, "CHECKPOINT_EXISTS"),
        ({}, "CHECKPOINT_EXISTS"),
        ({"request_id": "two", **said}, "CHECKPOINT_EXISTS"),
        ({"request_id": "one"}, "REQUEST_ID_CONFLICT"),
        ({"request_id": "one", **said, "seed": 1}, "REQUEST_ID_CONFLICT"),
        ({"request_id": "one", **said, "user_metadata": {}}, "REQUEST_ID_CONFLICT"),
    ]
    for other, reason in others:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await served.write(**other)
        assert refusal.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert reason_and_field(refusal.value)[0] == reason
    found = await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=PATH))
    assert found.checkpoint == first
    assert await served.read() == files(0)
    served.clock.now_s += 60
    await served.write()  # it has expired


async def test_overwrite_replaces_and_readers_under_way_finish(served: Served) -> None:
    """A reader that began gets the old bytes whole, the next one the new."""
    await served.write()
    call = served.stub.ReadCheckpoint(pb.ReadCheckpointRequest(checkpoint_path=PATH))
    responses = aiter(call)
    assert (await anext(responses)).HasField("checkpoint")
    await served.write(seed=1, overwrite=True, user_metadata={"new": "1"})
    await asyncio.to_thread(served.server._keeper.sweep)
    old: dict[str, bytes] = {}
    async for response in responses:
        old[response.piece.file_name] = old.get(response.piece.file_name, b"") + response.piece.data
    assert old == files(0)
    assert await served.read() == files(1)
    response = await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=PATH))
    assert response.checkpoint.user_metadata == {"new": "1"}


async def test_delete_and_expiry_make_it_not_found(served: Served) -> None:
    """Deleting frees the bytes with the next sweep, expiry once it was seen for a while."""
    await served.write(ttl=Duration(seconds=10))
    await served.write(SAMPLER_PATH.replace("sampler_weights", "weights") + "b", seed=1)
    served.clock.now_s += 11
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await served.read()
    assert reason_and_field(refusal.value)[0] == "CHECKPOINT_NOT_FOUND"
    await served.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(checkpoint_path=PATH + "b"))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await served.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(checkpoint_path=PATH + "b"))
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
    assert len(served.blobs()) == 6  # two of the four files are the same in both
    await asyncio.to_thread(served.server._keeper.sweep)
    assert len(served.blobs()) == 4
    served.monotonic.now_s += EXPIRY_GRACE_S
    await asyncio.to_thread(served.server._keeper.sweep)
    assert served.blobs() == []


async def test_capabilities_tell_the_enforced_limits(served: Served) -> None:
    """Every limit is set; the lease is what a renewal grants."""
    request = pb.CheckpointServiceGetCapabilitiesRequest()
    found = await served.stub.GetCapabilities(request)
    assert found.server_version
    assert set(found.export_formats) == set(pb.ExportFormat.values()) - {0}
    assert unlimited(found.limits) == ["download_url_ttl_max"]  # off unless it is set
    renewed = await served.stub.RenewLeases(pb.RenewLeasesRequest())
    assert renewed.lease == found.limits.lease


async def test_pages_are_stable_and_newest_first(served: Served) -> None:
    """New checkpoints do not shift the pages that follow."""
    for n in range(5):
        await served.write(f"tinsmith://run/weights/n{n}", seed=n)
    first = await served.stub.ListCheckpoints(pb.ListCheckpointsRequest(page_size=2))
    await served.write("tinsmith://run/weights/late", seed=9)
    second = await served.stub.ListCheckpoints(
        pb.ListCheckpointsRequest(page_size=4, page_token=first.next_page_token)
    )
    names = [c.name for c in [*first.checkpoints, *second.checkpoints]]
    assert names == ["n4", "n3", "n2", "n1", "n0"]
    assert (first.total_size, second.total_size, second.next_page_token) == (5, 6, "")
    kind = types_pb2.CHECKPOINT_KIND_SAMPLER
    other = await served.stub.ListCheckpoints(pb.ListCheckpointsRequest(kind=kind))
    assert other.total_size == 0
    every = await served.stub.ListCheckpoints(pb.ListCheckpointsRequest(page_size=2**31 - 1))
    assert len(every.checkpoints) == every.total_size  # a size that is too large is coerced


async def test_update_changes_only_what_the_mask_names(served: Served) -> None:
    """TTL and metadata; a TTL can be taken away again."""
    await served.write(user_metadata={"k": "v"})

    async def update(mask: list[str], **fields: object) -> pb.Checkpoint:
        request = pb.UpdateCheckpointRequest(
            checkpoint_path=PATH, update_mask=FieldMask(paths=mask), **fields
        )
        return (await served.stub.UpdateCheckpoint(request)).checkpoint

    changed = await update(["ttl"], ttl=Duration(seconds=60), user_metadata={"x": "y"})
    assert changed.HasField("expire_time")
    assert changed.user_metadata == {"k": "v"}
    changed = await update(["user_metadata"], ttl=Duration(seconds=9), user_metadata={"x": "y"})
    assert changed.user_metadata == {"x": "y"}
    assert not (await update(["ttl"])).HasField("expire_time")
    for mask in ([], ["name"]):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await update(mask)
        assert reason_and_field(refusal.value)[1] == "update_mask"


async def test_a_copy_shares_bytes_and_lives_its_own_life(served: Served) -> None:
    """Deleting the original leaves the copy; a repeat of the copy is the first one, another
    request for the same copy is refused."""
    await served.write()
    blobs = served.blobs()
    paths = {
        "source_checkpoint_path": PATH,
        "destination_checkpoint_path": PATH + "-copy",
    }
    request = pb.CopyCheckpointRequest(**paths, request_id="one", ttl=Duration(seconds=60))
    first = await served.stub.CopyCheckpoint(request)
    assert await served.stub.CopyCheckpoint(request) == first
    for other, reason in (
        ({}, "CHECKPOINT_EXISTS"),
        ({"request_id": "one"}, "REQUEST_ID_CONFLICT"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await served.stub.CopyCheckpoint(pb.CopyCheckpointRequest(**paths, **other))
        assert reason_and_field(refusal.value)[0] == reason
    assert served.blobs() == blobs
    await served.stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(checkpoint_path=PATH))
    assert await served.stub.CopyCheckpoint(request) == first
    await asyncio.to_thread(served.server._keeper.sweep)
    assert await served.read(PATH + "-copy") == files()
    wrong = pb.CopyCheckpointRequest(
        source_checkpoint_path=PATH + "-copy", destination_checkpoint_path=SAMPLER_PATH
    )
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await served.stub.CopyCheckpoint(wrong)
    assert reason_and_field(refusal.value)[1] == "destination_checkpoint_path"


async def test_export_is_a_tar_of_a_peft_folder(served: Served) -> None:
    """The same bytes every time, and tarfile and safetensors read them."""
    await served.write()
    request = pb.ExportCheckpointRequest(checkpoint_path=PATH)
    archives = [
        b"".join([part.piece.data async for part in served.stub.ExportCheckpoint(request)])
        for _ in range(2)
    ]
    assert archives[0] == archives[1]
    with tarfile.open(fileobj=io.BytesIO(archives[0])) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        member = tar.extractfile("adapter_model.safetensors")
        assert member is not None
        assert sorted(load(member.read())) == ["a.lora_A.weight", "a.lora_B.weight"]


async def test_writing_again_repairs_a_damaged_blob(served: Served) -> None:
    """A content that is there is checked before it is trusted."""
    await served.write()
    blob = served.blobs()[0]
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    await served.write(PATH + "-again")
    assert await served.read(PATH + "-again") == files()


async def test_one_folder_has_one_server(served: Served) -> None:
    """A second server on the same folder does not start."""
    config = CheckpointConfig(listen_address="127.0.0.1:0", data_folder=str(served.folder))
    with pytest.raises(StoreBusy):
        CheckpointServer(config)


def full_files(**changed: bytes | None) -> dict[str, bytes]:
    """Files of a full checkpoint; `None` leaves one out."""
    weights = {"model.norm.weight": np.ones(8, np.float32)}
    tokenizer = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    state = ModelState(FullConfig(), weights, {}, 3, {"model_type": "llama"}, tokenizer)
    found = {**to_files(state), **{_file(k): v for k, v in changed.items()}}
    return {name: content for name, content in found.items() if content is not None}


def _file(keyword: str) -> str:
    return keyword.replace("__", ".")


FULL = {"lora_config": None, "full_config": types_pb2.FullConfig()}


async def test_a_full_checkpoint_is_kept_and_exported_whole(served: Served) -> None:
    """What it holds is listed, its files come back, and the archive has all but our own."""
    content = full_files()
    path = PATH.replace("/weights/", "/sampler_weights/")
    await served.stub.WriteCheckpoint(messages(path, content, **FULL))
    found = await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=path))
    assert found.checkpoint.WhichOneof("tuning") == "full_config"
    assert await served.read(path) == content
    export = served.stub.ExportCheckpoint(pb.ExportCheckpointRequest(checkpoint_path=path))
    archive = b"".join([part.piece.data async for part in export])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = sorted(tar.getnames())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("changed", "tuning"),
    [
        ({"model__safetensors": None}, FULL),
        ({"config__json": None}, FULL),
        ({"model__safetensors": b"\x80\x04cposix\nsystem\n."}, FULL),
        ({"tokenizer__json": b"[]"}, FULL),
        ({"chat_template__jinja": b"\xff\xfe"}, FULL),
        ({"chat_template__jinja": b" " * (1 << 20) + b" "}, FULL),
        ({"modeling_llama__py": b"import os"}, FULL),
        ({"adapter_config__json": b"{}"}, FULL),
        ({}, {}),  # said to be an adapter
    ],
)
async def test_a_full_checkpoint_has_files_of_its_own(
    served: Served, changed: dict[str, bytes | None], tuning: dict[str, object]
) -> None:
    """A missing, foreign or malformed file is refused, and nothing is left behind."""
    with pytest.raises(grpc.RpcError) as refusal:
        await served.send(messages(PATH, full_files(**changed), **tuning))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not served.leftovers()
    with pytest.raises(grpc.RpcError) as refusal:
        await served.read()
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
