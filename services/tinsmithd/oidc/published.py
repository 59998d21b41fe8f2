"""The keys that an issuer publishes, as far as tokens may be signed with them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

KEYS_MAX = 64
RSA_BITS_MIN = 2048
_ALGORITHMS: Mapping[tuple[object, object], str] = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
"""What a key is for, by its kind and curve: a key says that, and not the token which it checks."""


@dataclass(frozen=True)
class PublishedKey:
    """One key.

    Attributes:
        key_id: What tokens call it; empty where it has no name.
        algorithm: What it is for.
        key: It, as PyJWT takes it.
        fingerprint: Tells it from every other one, also from a later one of its name.
    """

    key_id: str
    algorithm: str
    key: jwt.PyJWK
    fingerprint: str


class PublishedKeys:
    """All keys that an issuer publishes.

    Args:
        found: Its keys (JWK), as they were read; those that are for something else are passed over.
        algorithms: What tokens may be signed with.
    """

    def __init__(self, found: Sequence[Any] = (), algorithms: Iterable[str] = ()) -> None:
        taken = [_published(each, set(algorithms)) for each in found[:KEYS_MAX]]
        self._keys = [each for each in taken if each is not None]
        self.fingerprints = frozenset(each.fingerprint for each in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key_id: str | None, algorithm: str) -> PublishedKey | None:
        """The key of a token.

        Args:
            key_id: What the token calls it; None where it names none: then the only one is meant.
            algorithm: What the token is signed with.
        """
        fitting = [each for each in self._keys if each.algorithm == algorithm]
        if key_id is not None:
            fitting = [each for each in fitting if each.key_id == key_id]
        return fitting[0] if len(fitting) == 1 else None


def _published(found: Any, algorithms: set[str]) -> PublishedKey | None:
    """One key, or None where it is for something else, too weak or none at all."""
    if not isinstance(found, dict) or "d" in found:  # whoever read that one can sign with it
        return None
    curve = None if found.get("kty") == "RSA" else found.get("crv")
    if not isinstance(curve, str | None) or not isinstance(found.get("kty"), str):
        return None
    algorithm = _ALGORITHMS.get((found["kty"], curve))
    if algorithm is None or algorithm not in algorithms:
        return None
    uses = found.get("key_ops", ["verify"])
    if found.get("use", "sig") != "sig" or found.get("alg", algorithm) != algorithm:
        return None
    if not isinstance(uses, list) or "verify" not in uses:
        return None
    key_id = found.get("kid", "")
    try:
        key = jwt.PyJWK(found, algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, KeyError):
        return None
    if algorithm == "RS256" and key.key.key_size < RSA_BITS_MIN:
        return None
    text = json.dumps(found, sort_keys=True).encode()
    fingerprint = hashlib.blake2b(text, digest_size=16).hexdigest()
    return PublishedKey(key_id if isinstance(key_id, str) else "", algorithm, key, fingerprint)
