"""`tinker.auth`: whether the service can be used from here."""

import os

from tinsmith.service_client import ServiceClient

ACCESS_S = 5.0

__all__ = ["get_tinker_token", "raise_if_tinker_not_accessible", "tinker_has_credentials"]


def get_tinker_token() -> str | None:
    """`TINKER_API_KEY`; None where it is not set, which only hinders where a cluster has keys."""
    return os.environ.get("TINKER_API_KEY") or None


def tinker_has_credentials() -> bool:
    """True: a cluster that asks for a key says so itself."""
    return True


def raise_if_tinker_not_accessible() -> None:
    """Ask the service what it can do, for some seconds.

    Raises:
        TinkerError: Nobody answers, or the caller is refused.
    """
    with ServiceClient(give_up_after_s=ACCESS_S) as service:
        service.get_server_capabilities()
