"""Which Training server has the models of a tenant, where a cluster has several.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
IEEE/ACM Transactions on Networking 1998): one server more takes its share from each of the others,
and no tenant moves between two that stay.
"""

import hashlib
from collections.abc import Sequence


def shard_of(owner: str, addresses: Sequence[str]) -> str:
    """The address that has an owner's models.

    Args:
        owner: A tenant.
        addresses: All of them, at least one, in any order.
    """
    return max(addresses, key=lambda address: _weight(owner, address))


def _weight(owner: str, address: str) -> bytes:
    return hashlib.blake2b(f"{address} {owner}".encode(), digest_size=16).digest()
