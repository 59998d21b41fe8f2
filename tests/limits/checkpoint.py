"""The named limits of a Checkpoint server."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from checkpoints import commit, files, messages, piece
from limits.held import Case, Limits, Refusal
from scale.servers import Keys, Server
from tinsmith import v1 as pb
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.keys import KeyFile, Scope
from wire import limit_values

MIB = 1024 * 1024
SETTINGS: dict[str, object] = {
    "message_bytes_max": 32 * MIB,
    "message_items_max": 20_000,
    "concurrent_calls_max": 16,
    "peer_share_max": 1.0,
    "received_bytes_max": 256 * MIB,
    "rank_max": 8,
    "files_max": 6,
    "checkpoint_bytes_max": 32 * MIB,
    "staged_bytes_max": 64 * MIB,
    "writer_epoch_step_max": 10,
}
ELSEWHERE = {
    "received_bytes_max": "tests/unit/test_budget.py, tests/attack/test_streams.py",
    "peer_share_max": "tests/unit/test_budget.py",
    "stream_stall": "tests/attack/test_streams.py",
    "page_size_max": "tests/unit/test_limits.py",
    "lease": "tests/unit/test_leases.py",
    "download_url_ttl_max": "tests/faults/test_checkpoint_replicas.py",
}
"""Limits that are no matter of one request more, and who holds them."""
SMALL = "small"
"""A tenant who may store what one checkpoint has."""
PATH = "tinsmith://run/weights/one"
LORA = pb.LoraConfig(rank=4)
PIECE_BYTES = 1 * MIB
WAIT_S = 60.0


@contextlib.contextmanager
def checkpoint_limits(folder: Path) -> Iterator["CheckpointLimits"]:
    """A server with small limits, for the body of the `with`."""
    keys = Keys(folder, SMALL)
    stored = sum(map(len, files(0).values()))
    KeyFile(keys.path).set_limits(SMALL, {"tenant_stored_bytes_max": stored})
    server_key = KeyFile(keys.path).create("", Scope.SERVER).text
    with Server("checkpoint", folder, keys, **SETTINGS) as server:
        yield CheckpointLimits(server, server_key)


class CheckpointLimits(Limits):
    """Makes the calls.

    Args:
        server: Runs with `SETTINGS`.
        server_key: That of one of the cluster's servers.
    """

    otherwise = (
        # They are let in, and then they say nothing that is a checkpoint.
        *("message_bytes_max", "message_items_max", "rank_max", "request_id_characters_max"),
        *("user_metadata_entries_max", "user_metadata_key_characters_max"),
        *("user_metadata_value_characters_max", "ttl_max", "piece_bytes_max", "files_max"),
        *("checkpoint_bytes_max", "staged_bytes_max", "lease_id_characters_max"),
    )

    def __init__(self, server: Server, server_key: str) -> None:
        self._server, self._stub, self._shown = server, server.stub, server.shown()
        self._small = server.shown(SMALL)
        self._cluster = ((AUTHORIZATION, f"{SCHEME} {server_key}"),)
        self._epoch = 0
        asked = pb.CheckpointServiceGetCapabilitiesRequest()
        told = self._stub.GetCapabilities(asked, metadata=self._small).limits
        values = {name: int(value) for name, value in limit_values(told).items()}
        cases: Mapping[str, Case] = {
            "message_bytes_max": self._message_bytes,
            "message_items_max": self._message_items,
            "concurrent_calls_max": self._concurrent,
            "rank_max": lambda n: self._header(lora_config=pb.LoraConfig(rank=n)),
            "request_id_characters_max": lambda n: self._header(request_id="r" * n),
            "user_metadata_entries_max": lambda n: self._header(
                user_metadata={f"k{i}": "" for i in range(n)}
            ),
            "user_metadata_key_characters_max": lambda n: self._header(user_metadata={"k" * n: ""}),
            "user_metadata_value_characters_max": lambda n: self._header(
                user_metadata={"k": "v" * n}
            ),
            "ttl_max": lambda n: self._header(ttl=Duration(seconds=n)),
            "piece_bytes_max": lambda n: self._write(PATH, [n]),
            "files_max": self._files,
            "checkpoint_bytes_max": lambda n: self._write(PATH, _cut(n)),
            "staged_bytes_max": self._staged,
            "leases_max": self._leases,
            "model_ids_max": lambda n: self._release(model_ids=[f"m{i}" for i in range(n)]),
            "writer_characters_max": lambda n: self._release(writer="w" * n),
            "writer_epoch_step_max": self._epochs,
            "lease_id_characters_max": lambda n: self._get(lease_id="l" * n),
            "tenant_stored_bytes_max": self._stored,
        }
        super().__init__(server.process.pid, values, cases)

    def tidy(self) -> None:
        """Delete what was stored."""
        for shown in (self._shown, self._small):
            found = self._stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=shown)
            for each in found.checkpoints:
                request = pb.DeleteCheckpointRequest(checkpoint_path=each.checkpoint_path)
                self._stub.DeleteCheckpoint(request, metadata=shown)

    def get(self, path: str) -> None:
        """Ask for a checkpoint."""
        self._get(checkpoint_path=path)

    def _get(self, **fields: Any) -> None:
        request = pb.GetCheckpointRequest(**{"checkpoint_path": PATH, **fields})
        with self.sending(request.ByteSize()):
            self._stub.GetCheckpoint(request, metadata=self._shown)

    def _message_bytes(self, nbytes: int) -> None:
        around = pb.GetCheckpointRequest(checkpoint_path="x" * nbytes).ByteSize() - nbytes
        self._get(checkpoint_path="x" * (nbytes - around))

    def _message_items(self, items: int) -> None:
        # Four bytes of text are one; the field is another.
        self._get(checkpoint_path="x" * (4 * (items - 1)))

    def _concurrent(self, count: int) -> None:
        """Watches, and one more call by a connection of its own: one holds no more streams."""
        own = [("grpc.use_local_subchannel_pool", 1)]
        watches = [
            self._stub.WatchCheckpoints(pb.WatchCheckpointsRequest(), metadata=self._shown)
            for _ in range(count - 1)
        ]
        try:
            for watch in watches:
                next(watch)  # it has its place
            with grpc.insecure_channel(self._server.address, own) as channel:
                stub = CheckpointServiceStub(channel)
                grpc.channel_ready_future(channel).result(WAIT_S)
                with self.sending():
                    stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=self._shown)
        finally:
            for watch in watches:
                watch.cancel()
            for watch in watches:
                watch.code()  # waits for its end

    def _header(self, **fields: Any) -> None:
        """A write that ends after its header."""
        self._stream([_header(PATH, **fields)])

    def _stream(self, requests: list[pb.WriteCheckpointRequest]) -> None:
        with self.sending(sum(each.ByteSize() for each in requests)):
            self._stub.WriteCheckpoint(iter(requests), metadata=self._shown, timeout=60)

    def _write(self, path: str, sizes: list[int]) -> None:
        """A write of a file of zeros, in pieces, which is none of a checkpoint."""
        requests, offset = [_header(path)], 0
        for size in sizes:
            requests.append(piece("adapter_model.safetensors", offset, bytes(size)))
            offset += size
        content = {"adapter_model.safetensors": bytes(offset)}
        self._stream([*requests, commit(content)])

    def _files(self, count: int) -> None:
        listed = {f"file-{n}": b"" for n in range(count)}
        self._stream([_header(PATH), commit(listed)])

    def _staged(self, nbytes: int) -> None:
        """A write that stays open with some of the bytes, and one with the rest."""
        held = nbytes // 2
        ends = threading.Event()

        def first() -> Iterator[pb.WriteCheckpointRequest]:
            yield _header(f"{PATH}-first")
            for offset in range(0, held, PIECE_BYTES):
                data = bytes(min(PIECE_BYTES, held - offset))
                yield piece("adapter_model.safetensors", offset, data)
            ends.wait()

        writing = self._stub.WriteCheckpoint.future(first(), metadata=self._shown)
        try:
            self._until_staged(held)  # before, the second is not too much
            self.measure()
            self._write(PATH, _cut(nbytes - held))
        finally:
            writing.cancel()
            ends.set()
            self._until_staged(0)

    def _until_staged(self, nbytes: int) -> None:
        """Wait until writes that are open have brought so many bytes to the disk."""
        staging, end_s = self._server.folder / "data" / "staging", time.monotonic() + WAIT_S
        while sum(_size(file) for file in staging.glob("*/*")) != nbytes:
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def _leases(self, count: int) -> None:
        leases = [pb.Lease(checkpoint_path=f"{PATH}-{n}", lease_id="l") for n in range(count)]
        request = pb.RenewLeasesRequest(leases=leases)
        with self.sending(request.ByteSize()):
            self._stub.RenewLeases(request, metadata=self._shown)

    def _release(self, **fields: Any) -> None:
        request = pb.ReleaseModelsRequest(**fields)
        with self.sending(request.ByteSize()):
            self._stub.ReleaseModels(request, metadata=self._cluster)

    def _epochs(self, step: int) -> None:
        self._epoch += step
        self._release(writer="training", writer_epoch=self._epoch)

    def _stored(self, nbytes: int) -> None:
        """A checkpoint that is as large as all may be; above that, one more."""
        content = files(0)
        for name in ("one", "two")[: 1 + bool(self.above)]:
            requests = messages(f"tinsmith://run/weights/{name}", content)
            with self.sending(nbytes):
                self._stub.WriteCheckpoint(requests, metadata=self._small, timeout=60)
        if not self.above and sum(map(len, content.values())) != nbytes:
            raise Refusal("", "", "tenant_stored_bytes_max")


def _header(path: str, **fields: Any) -> pb.WriteCheckpointRequest:
    values = {"base_model": "tiny", "lora_config": LORA, "step_count": 3, **fields}
    return pb.WriteCheckpointRequest(
        header=pb.WriteCheckpointHeader(checkpoint_path=path, **values)
    )


def _size(file: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
        return file.stat().st_size
    return 0


def _cut(nbytes: int) -> list[int]:
    whole, rest = divmod(nbytes, PIECE_BYTES)
    return [PIECE_BYTES] * whole + [rest] * bool(rest)
