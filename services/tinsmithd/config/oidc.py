"""Settings of tokens: whose are taken beside keys, and what they stand for."""

import re
from typing import Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, Field, model_validator
from pydantic_settings import SettingsConfigDict

from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import AboveZero, Names, Number, is_loopback

ALGORITHMS = ("RS256", "ES256", "EdDSA")
"""What tokens may be signed with. Nothing symmetric: whoever can check such a one can make it."""
GIVEN_SCOPES = ("tenant", "read-only", "admin")
"""What a token can be for. `server` is not among them: servers show each other a key."""
_PREFIX = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,15}|")


class OidcSettings(BaseModel):
    """Whose tokens are taken (OpenID Connect), and what is made of them."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    oidc_issuer: str = ""
    """Who signs tokens (JWT) that callers may show in place of a key: the issuer's URL, exactly as
    the tokens' `iss` has it. Its keys are found by `/.well-known/openid-configuration`, with TLS
    unless it is on loopback. It takes `pip install 'tinsmith[oidc]'`. Empty: keys alone are
    taken."""
    oidc_audience: str = ""
    """Whom tokens must be for: their `aud` is this, or has it among others."""
    oidc_tenant_claim: str = "sub"
    """The claim of a token that says whose it is."""
    oidc_tenant_prefix: str = "oidc-"
    """What the names of such tenants begin with, so that no token is good for what a key's tenant
    has. What no tenant's name can have is written as `_` and two hex digits for each byte: `a|b` is
    the tenant `oidc-a_7Cb`. Empty: the claim alone is the name, and keys may have the same."""
    oidc_scope_claim: str = ""
    """The claim that says what a token is for: a text with spaces, or a list of texts. Empty: every
    token of the issuer for this audience has scope `tenant`."""
    oidc_scopes: Names = Field({})
    """What the values of that claim give: `tenant`, `read-only` or `admin`, such as `{"trainers" =
    "tenant"}`. The most of several counts; a token that has none of them may do nothing."""
    oidc_algorithms: str = ", ".join(ALGORITHMS)
    """What tokens may be signed with, with commas, of RS256, ES256 and EdDSA."""
    oidc_jwks_url: str = ""
    """Where the issuer's keys are, if that is not its own host. Empty: where its configuration
    says, which must be that host."""
    oidc_ca_file: str = ""
    """Authorities (PEM) that vouch for the issuer's certificate. Empty: those of this machine."""
    oidc_leeway_s: Number = Field(30.0, le=300)
    """How far the issuer's clock and this one may be apart."""
    oidc_lifetime_s_max: AboveZero = 86_400.0
    """A token that is good for longer than this from now on is refused: nothing revokes one but its
    end, and that of the key that signed it."""
    oidc_refresh_s: AboveZero = 300.0
    """How old what is known of the issuer's keys may be before they are fetched again, while
    callers go on. A key that it took away is not good for longer than this and `oidc_timeout_s`,
    while it answers; while it does not, the keys that are known stay good."""
    oidc_unknown_key_s: AboveZero = 10.0
    """Least time between two fetches, also where a token was signed with a key that is not known,
    or the issuer did not answer. Who shows such a token waits for the next one."""
    oidc_timeout_s: AboveZero = Field(5.0, le=60)
    """Longest time that a fetch takes."""

    @model_validator(mode="after")
    def _tokens_are_whole(self) -> Self:
        if not self.oidc_issuer:
            return self
        issuer = _checked("oidc_issuer", self.oidc_issuer)
        if issuer.query:
            raise broken_rule("oidc_issuer", "must have no query")
        if self.oidc_jwks_url:
            _checked("oidc_jwks_url", self.oidc_jwks_url)
        if not self.oidc_audience:
            message = "must be set where oidc_issuer is: its tokens for others would be good here"
            raise broken_rule("oidc_audience", message)
        if not getattr(self, "keys_file", ""):
            message = "must be set where oidc_issuer is: servers know each other by a key"
            raise broken_rule("keys_file", message)
        if not self.oidc_tenant_claim:
            raise broken_rule("oidc_tenant_claim", "must be set where oidc_issuer is")
        if not _PREFIX.fullmatch(self.oidc_tenant_prefix):
            raise broken_rule("oidc_tenant_prefix", f"must match {_PREFIX.pattern}")
        if not self.algorithms or not set(self.algorithms) <= set(ALGORITHMS):
            raise broken_rule("oidc_algorithms", f"must be of {', '.join(ALGORITHMS)}")
        return self

    @model_validator(mode="after")
    def _scopes_are_some_that_tokens_have(self) -> Self:
        if bool(self.oidc_scopes) != bool(self.oidc_scope_claim):
            key, other = "oidc_scopes", "oidc_scope_claim"
            if self.oidc_scopes:
                key, other = other, key
            raise broken_rule(key, f"must be set where {other} is")
        if wrong := sorted(set(self.oidc_scopes.values()) - set(GIVEN_SCOPES)):
            message = f"must be of {', '.join(GIVEN_SCOPES)}, not {wrong[0][:40]!r}"
            raise broken_rule("oidc_scopes", message)
        return self

    @property
    def algorithms(self) -> tuple[str, ...]:
        """What tokens may be signed with."""
        parts = (part.strip() for part in self.oidc_algorithms.split(","))
        return tuple(part for part in parts if part)


def _checked(key: str, url: str) -> SplitResult:
    """The parts of a URL that may be called.

    Raises:
        PydanticCustomError: It may not.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 0
    except ValueError:
        raise broken_rule(key, "must be a URL") from None
    plain = parts.scheme == "http" and bool(host) and is_loopback(f"{host}:{port}")
    if not host or not (parts.scheme == "https" or plain):
        raise broken_rule(key, "must be https://..., or http:// on loopback")
    if parts.username or parts.fragment or not url.isprintable() or " " in url:
        raise broken_rule(key, "must have no user, no fragment and no spaces")
    return parts
