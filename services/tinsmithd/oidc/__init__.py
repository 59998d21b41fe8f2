"""Tokens of an issuer (OpenID Connect): its keys, fetched and kept, and who a token stands for.

Nothing here knows the wire of callers. `tinsmithd.rpc.ring` opens it where a setting names an
issuer, and only then: it needs PyJWT.
"""

from tinsmithd.oidc.tokens import Tokens

__all__ = ["Tokens"]
