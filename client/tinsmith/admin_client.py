"""`AdminClient`: Tinker's accounts, which a cluster of one's own does not have."""

from datetime import date, datetime
from typing import Any, Literal

from tinsmith._twins import async_twins
from tinsmith.errors import unsupported

AuditLogEventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]


@async_twins(
    *("get_audit_log", "get_billing_usage", "get_current_checkpoint_storage_usage"), final=True
)
class Accounts:
    """What Tinker tells of accounts; each method raises UnimplementedError."""

    def get_audit_log(self, event_type: AuditLogEventType = "all", day: date | None = None) -> Any:
        """Not supported."""
        raise unsupported("get_audit_log", "there is none; the servers log who asked for what")

    def get_billing_usage(self, starting_on: datetime | str, ending_before: datetime | str) -> Any:
        """Not supported."""
        raise unsupported("get_billing_usage", "there is no billing; the servers have metrics")

    def get_current_checkpoint_storage_usage(self, project_id: str | None = None) -> Any:
        """Not supported."""
        why = "RestClient.list_user_checkpoints has the size of each checkpoint"
        raise unsupported("get_current_checkpoint_storage_usage", why)

    def get_telemetry(self) -> None:
        """None: there is no telemetry."""


class AdminClient(Accounts):
    """Takes what Tinker's takes, and can do nothing: a cluster has no accounts.

    Args:
        holder: Internal to Tinker.
        base_url: As in `ServiceClient`.
        api_key: Likewise.
    """

    def __init__(
        self, holder: Any = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        pass
