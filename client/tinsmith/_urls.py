"""The part of RestClient that hands out URLs: whoever has one needs no key until it expires.

The gateway makes them; where checkpoints are in an object store that signs some itself, the
Checkpoint server gives those.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from tinsmith import _check, _gateway, _loop
from tinsmith._connection import CHECKPOINT, Connection
from tinsmith._twins import async_twins
from tinsmith.checkpoints import OWN_FILES, stored
from tinsmith.errors import UnavailableError
from tinsmith.futures import APIFuture
from tinsmith.types import (
    CheckpointArchiveUrlResponse,
    ExternalWeightsUrlsResponse,
    ParsedCheckpointTinkerPath,
)
from tinsmith.v1 import checkpoint_service_pb2 as pb

LASTS = timedelta(hours=1)
"""How long a URL of an object store is asked for."""


@async_twins(
    *("get_external_weights_urls", "get_checkpoint_archive_url"),
    *("get_checkpoint_archive_url_from_tinker_path", "export_session_trace"),
    final=True,
)
class Urls:
    """URLs of downloads. Those that the gateway makes are UnimplementedError, from the future,
    where nobody says where it is."""

    _connection: Connection

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """A URL for each file of what `TrainingClient.save_weights_external` saved.

        Raises:
            NotFoundError: There is no such checkpoint; from the future.
        """
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        if parsed.checkpoint_type != "external":
            why = "only external weights have URLs; save_weights_external saves them"
            raise _check.refuse("tinker_path", why)

        async def ask() -> ExternalWeightsUrlsResponse:
            if (direct := await _direct(self._connection, stored(tinker_path))) is not None:
                return direct
            found = await self._of_checkpoint("get_external_weights_urls", parsed)
            urls = {str(name): str(url) for name, url in dict(found["urls"]).items()}
            return ExternalWeightsUrlsResponse(urls, datetime.fromisoformat(found["expires"]))

        return APIFuture(_loop.run(ask()))

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        """A URL of a checkpoint as a tar; `checkpoint_id` is `weights/<name>` or so."""
        run = _check.text(training_run_id, "training_run_id")
        checkpoint = _check.text(checkpoint_id, "checkpoint_id")
        return self.get_checkpoint_archive_url_from_tinker_path(f"tinsmith://{run}/{checkpoint}")

    def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        """A URL of a checkpoint as a tar."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)

        async def ask() -> CheckpointArchiveUrlResponse:
            found = await self._of_checkpoint("get_checkpoint_archive_url", parsed)
            expires = datetime.fromisoformat(found["expires"])
            return CheckpointArchiveUrlResponse(str(found["url"]), expires)

        return APIFuture(_loop.run(ask()))

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """A URL of what a session did, as a timeline that ui.perfetto.dev shows.

        It has the steps and the checkpoints of the session's models, and no samples.
        """
        session = quote(_check.text(session_id, "session_id"), safe="")

        async def ask() -> str:
            path = f"/api/v1/sessions/{session}/trace_export"
            found = await _gateway.ask(self._connection, "export_session_trace", path)
            return str(found["url"])

        return APIFuture(_loop.run(ask()))

    async def _of_checkpoint(
        self, what: str, parsed: ParsedCheckpointTinkerPath
    ) -> Mapping[str, Any]:
        kind, name = parsed.checkpoint_id.split("/", 1)
        parts = (parsed.training_run_id, "checkpoints", kind, name, _ENDS[what])
        path = "/".join(quote(part, safe="") for part in parts)
        found = await _gateway.ask(self._connection, what, f"/api/v1/training_runs/{path}")
        if "expires" not in found:
            raise UnavailableError("what answers as the gateway is none: it gave no URL")
        return found


async def _direct(connection: Connection, path: str) -> ExternalWeightsUrlsResponse | None:
    """URLs of the object store itself; None where it gives none."""

    async def limits() -> pb.CheckpointLimits:
        request = pb.CheckpointServiceGetCapabilitiesRequest()
        return (await (await connection.checkpoint()).GetCapabilities(request)).limits

    async def checkpoint() -> pb.Checkpoint:
        request = pb.GetCheckpointRequest(checkpoint_path=path)
        request.download_url_ttl.FromTimedelta(lasts)
        return (await (await connection.checkpoint()).GetCheckpoint(request)).checkpoint

    known = await connection.retrying("get_capabilities", limits, service=CHECKPOINT)
    lasts = min(known.download_url_ttl_max.ToTimedelta(), LASTS)
    if not lasts:
        return None
    expires = (datetime.now(UTC) + lasts).replace(microsecond=0)
    found = await connection.retrying("get_checkpoint", checkpoint, service=CHECKPOINT)
    urls = {each.name: each.download_url for each in found.files if each.name not in OWN_FILES}
    return ExternalWeightsUrlsResponse(urls, expires) if all(urls.values()) else None


_ENDS = {
    "get_external_weights_urls": "external_weights_urls",
    "get_checkpoint_archive_url": "archive",
}
