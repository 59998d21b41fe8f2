"""`AdminClient`: what Tinker tells of accounts, as far as a cluster of one's own has it."""

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, Literal

from tinsmith import _loop
from tinsmith._connection import CHECKPOINT, Connection
from tinsmith._twins import async_twins
from tinsmith.addresses import address_of
from tinsmith.errors import unsupported
from tinsmith.futures import APIFuture
from tinsmith.keys import shown_of
from tinsmith.types import (
    CurrentCheckpointStorageUsageItem,
    CurrentCheckpointStorageUsageResponse,
)
from tinsmith.types.unsupported import Holder
from tinsmith.v1 import checkpoint_service_pb2 as pb

AuditLogEventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]
PAGE_SIZE = 1000
GIGABYTE = 10**9
PROJECT = "default"
"""The one project that there is."""


@async_twins(
    *("get_audit_log", "get_billing_usage", "get_current_checkpoint_storage_usage"), final=True
)
class Accounts:
    """What Tinker tells of accounts; what a cluster has none of raises UnimplementedError."""

    _connection: Connection

    def get_audit_log(self, event_type: AuditLogEventType = "all", day: date | None = None) -> Any:
        """Not supported."""
        raise unsupported("get_audit_log", "there is none; the servers log who asked for what")

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> Any:
        """Not supported."""
        raise unsupported("get_billing_usage", "there is no billing; the servers have metrics")

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """How many checkpoints each owner has, and how many bytes; nothing has a price.

        Args:
            project_id: "default", or None.
        """
        if project_id not in (None, PROJECT):
            raise unsupported("project_id", f"there is one project, {PROJECT!r}")
        return APIFuture(_loop.run(_usage(self._connection)))

    def get_telemetry(self) -> None:
        """None: there is no telemetry."""


async def _usage(connection: Connection) -> CurrentCheckpointStorageUsageResponse:
    owners: dict[str, list[int]] = {}
    token = ""
    while True:
        request = pb.ListCheckpointsRequest(page_size=PAGE_SIZE, page_token=token)

        async def attempt(
            request: pb.ListCheckpointsRequest = request,
        ) -> pb.ListCheckpointsResponse:
            return await (await connection.checkpoint()).ListCheckpoints(request)

        page = await connection.retrying("list_checkpoints", attempt, service=CHECKPOINT)
        for each in page.checkpoints:
            owners.setdefault(each.owner, []).append(each.size_bytes)
        token = page.next_page_token
        if not token:
            return _usage_of(owners)


def _usage_of(owners: Mapping[str, list[int]]) -> CurrentCheckpointStorageUsageResponse:
    return CurrentCheckpointStorageUsageResponse(
        [
            CurrentCheckpointStorageUsageItem(
                checkpoint_count=len(sizes),
                size_bytes=sum(sizes),
                size_gigabytes=sum(sizes) / GIGABYTE,
                user_name=owner,
            )
            for owner, sizes in sorted(owners.items())
        ]
    )


class AdminClient(Accounts):
    """Tells what the caller's checkpoints take; of accounts a cluster has nothing else.

    Args:
        holder: `ServiceClient.holder`, in place of an address.
        base_url: As in `ServiceClient`.
        api_key: Likewise.
    """

    def __init__(
        self, holder: Any = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        if isinstance(holder, Holder):
            self._connection = holder.connection
        else:
            self._connection = Connection(address_of(base_url), shown=shown_of(api_key))
