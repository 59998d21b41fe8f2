"""The Checkpoint server as the Sampler uses it: a client of its public API."""

import functools
import hashlib
import zlib
from collections.abc import Collection

import grpc

from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd import failpoints, state_files
from tinsmithd.domain import CheckpointKind, CheckpointPath, ModelState
from tinsmithd.errors import DataLoss, FailedPrecondition, Reason, Unavailable
from tinsmithd.rpc.channels import open_aio_channel
from tinsmithd.rpc.status import from_rpc_error
from tinsmithd.sampler.scheduler import Adapter

GET_S_MAX = 30.0


class CheckpointSource:
    """Finds and fetches the adapters of SAMPLER checkpoints."""

    def __init__(self, target: str) -> None:
        self._channel = open_aio_channel(target)
        self._stub = CheckpointServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def find(self, path: CheckpointPath, base_model: str) -> Adapter:
        """The adapter that a path means now: a name that was overwritten is another adapter.

        Raises:
            NotFound: There is no such checkpoint (CHECKPOINT_NOT_FOUND).
            FailedPrecondition: It is of another kind (WRONG_CHECKPOINT_KIND), of another base
                model, or no adapter (INCOMPATIBLE_CHECKPOINT).
            Unavailable: The Checkpoint server does not answer.
        """
        if path.kind is not CheckpointKind.SAMPLER:
            message = f"{path} is for training; save one for the sampler"
            raise FailedPrecondition(message, Reason.WRONG_CHECKPOINT_KIND)
        try:
            request = pb.GetCheckpointRequest(path=str(path))
            response = await self._stub.GetCheckpoint(request, timeout=GET_S_MAX)
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
        found = response.checkpoint
        if found.base_model != base_model:
            message = f"{path} is of base model {found.base_model!r}, not {base_model!r}"
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        if found.WhichOneof("tuning") == "full_config":
            message = (
                f"{path} holds all weights of a model, which this Sampler does not serve; export "
                "it and serve the folder as a base model"
            )
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
        content = hashlib.sha256(b"".join(file.sha256 for file in found.files)).hexdigest()
        return Adapter(f"{path}@{content}", functools.partial(self._fetch, path, content))

    async def renew(self, paths: Collection[CheckpointPath]) -> float:
        """Renew the leases on ephemeral checkpoints; returns for how long, seconds.

        Raises:
            Unavailable: The Checkpoint server does not answer.
        """
        request = pb.RenewLeasesRequest(paths=map(str, paths))
        try:
            return (await self._stub.RenewLeases(request, timeout=GET_S_MAX)).lease_seconds
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error

    async def _fetch(self, path: CheckpointPath, content: str) -> ModelState:
        listed: dict[str, bytes] = {}
        files: dict[str, bytearray] = {}
        try:
            async for response in self._stub.ReadCheckpoint(
                pb.ReadCheckpointRequest(path=str(path))
            ):
                if response.HasField("checkpoint"):
                    listed = {file.name: file.sha256 for file in response.checkpoint.files}
                    continue
                piece = response.piece
                if zlib.crc32(piece.data) != piece.crc32:
                    raise _corrupt(f"{piece.file_name} of {path} was damaged on its way")
                files.setdefault(piece.file_name, bytearray()).extend(piece.data)
                failpoints.hit("sampler_mid_swap")
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.CHECKPOINT_UNAVAILABLE) from error
        if hashlib.sha256(b"".join(listed.values())).hexdigest() != content:
            message = f"{path} was replaced while it was read"
            raise Unavailable(message, Reason.CHECKPOINT_UNAVAILABLE, retry_after_s=0.1)
        for name, digest in listed.items():
            if hashlib.sha256(files.get(name, b"")).digest() != digest:
                raise _corrupt(f"{name} of {path} does not match its digest")
        return state_files.from_files(
            {name: bytes(files[name]) for name in listed if name in files}
        )


def _corrupt(message: str) -> DataLoss:
    return DataLoss(message, Reason.CHECKPOINT_CORRUPT)
