"""What the settings of tokens take, and which tenant a claim stands for."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith import keys
from tinsmithd.config import CheckpointConfig, ConfigError
from tinsmithd.oidc import tokens
from tinsmithd.oidc.tokens import tenant_of
from tinsmithd.owners import OWNER_PATTERN

GOOD = {"keys_file": "k", "oidc_issuer": "https://issuer.example/a", "oidc_audience": "tinsmith"}


@pytest.mark.parametrize(
    ("value", "tenant"),
    [
        ("alice", "oidc-alice"),
        ("248289761001", "oidc-248289761001"),
        ("auth0|5f7c8ec7c33c6c004bbafe82", "oidc-auth0_7C5f7c8ec7c33c6c004bbafe82"),
        ("system:serviceaccount:team:job", "oidc-system_3Aserviceaccount_3Ateam_3Ajob"),
        ("alice@example.org", "oidc-alice_40example.org"),
        ("a_b", "oidc-a_5Fb"),
        ("*", "oidc-_2A"),
        ("default", "oidc-default"),
        ("../alice", "oidc-.._2Falice"),
    ],
)
def test_a_claim_stands_for_a_tenant_of_its_own(value: str, tenant: str) -> None:
    """One that can be read."""
    assert tenant_of("oidc-", value) == tenant
    assert OWNER_PATTERN.fullmatch(tenant)


def test_a_claim_that_is_too_long_for_a_name_has_its_digest() -> None:
    """Which no other claim can be written as."""
    found = tenant_of("oidc-", "x" * 200)
    assert found.startswith("oidc-__")
    assert OWNER_PATTERN.fullmatch(found)
    assert tenant_of("oidc-", "x" * 201) != found
    assert tenant_of("oidc-", found.removeprefix("oidc-")) != found


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_two_claims_are_two_tenants(values: list[str]) -> None:
    """Whatever their texts, also where one has the other's name as its own."""
    named = [*values, *(tenant_of("", value) for value in values)]
    for one, other in itertools.combinations(dict.fromkeys(named), 2):
        assert tenant_of("oidc-", one) != tenant_of("oidc-", other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oidc_issuer": "http://issuer.example"}, "oidc_issuer: must be https://..., or http://"),
        ({"oidc_issuer": "ftp://localhost"}, "oidc_issuer: must be https://..., or http://"),
        ({"oidc_issuer": "issuer.example"}, "oidc_issuer: must be https://..., or http://"),
        ({"oidc_issuer": "https://a.example/?x=1"}, "oidc_issuer: must have no query"),
        ({"oidc_issuer": "https://me:hush@a.example"}, "oidc_issuer: must have no user"),
        ({"oidc_issuer": "https://a.example/#x"}, "oidc_issuer: must have no user, no fragment"),
        ({"oidc_issuer": "https://[::1"}, "oidc_issuer: must be a URL"),
        ({"oidc_jwks_url": "http://keys.example"}, "oidc_jwks_url: must be https://..., or http:"),
        ({"oidc_audience": ""}, "oidc_audience: must be set where oidc_issuer is"),
        ({"keys_file": ""}, "keys_file: must be set where oidc_issuer is"),
        ({"oidc_algorithms": "HS256"}, "oidc_algorithms: must be of RS256, ES256, EdDSA"),
        ({"oidc_algorithms": "RS256, none"}, "oidc_algorithms: must be of RS256, ES256, EdDSA"),
        ({"oidc_algorithms": " "}, "oidc_algorithms: must be of RS256, ES256, EdDSA"),
        ({"oidc_tenant_prefix": "-"}, "oidc_tenant_prefix: must match"),
        ({"oidc_tenant_prefix": "a/"}, "oidc_tenant_prefix: must match"),
        ({"oidc_scope_claim": "groups"}, "oidc_scopes: must be set where oidc_scope_claim is"),
        ({"oidc_scopes": {"a": "admin"}}, "oidc_scope_claim: must be set where oidc_scopes is"),
        (
            {"oidc_scope_claim": "groups", "oidc_scopes": {"a": "server"}},
            "oidc_scopes: must be of tenant, read-only, admin, not 'server'",
        ),
        ({"oidc_leeway_s": 3600}, "oidc_leeway_s: must be at least 0 and at most 300"),
    ],
)
def test_settings_that_would_let_in_too_many_are_refused(
    changes: dict[str, object], message: str
) -> None:
    """And those that make no sense; each says which it is."""
    with pytest.raises(ConfigError) as refused:
        CheckpointConfig(**{**GOOD, **changes})
    assert f"checkpoint.{message}" in str(refused.value)
    assert "hush" not in str(refused.value)


def test_a_client_shows_what_servers_take() -> None:
    """Tokens of the same length."""
    assert tokens.CHARACTERS_MAX == keys.CHARACTERS_MAX


def test_an_issuer_may_be_on_this_machine() -> None:
    """In plain text there, and nowhere else."""
    for host in ("localhost", "127.0.0.1", "[::1]"):
        config = CheckpointConfig(**{**GOOD, "oidc_issuer": f"http://{host}:8080/realms/a"})
        assert config.algorithms == ("RS256", "ES256", "EdDSA")
