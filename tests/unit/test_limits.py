"""Limits have one name: in settings, in refusals and in what every service says of itself."""

import ast
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

import tinsmithd
from tinsmith import v1
from tinsmithd.config import CheckpointConfig, SamplerConfig, TrainingConfig
from tinsmithd.convert.limits import limits_to_pb, setting_of
from tinsmithd.errors import InvalidArgument
from tinsmithd.rpc.paging import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, Page, page_of, token_after
from wire import OF_TENANTS, limit_values

LIMITS: list[Descriptor] = [
    v1.TrainingLimits.DESCRIPTOR,
    v1.SamplerLimits.DESCRIPTOR,
    v1.CheckpointLimits.DESCRIPTOR,
]
CAPABILITIES: list[Descriptor] = [
    v1.GetCapabilitiesResponse.DESCRIPTOR,
    v1.SamplerServiceGetCapabilitiesResponse.DESCRIPTOR,
    v1.CheckpointServiceGetCapabilitiesResponse.DESCRIPTOR,
]
SHARED_BELOW = 16
OF_ONE_PROCESS = {
    *("identity_entries_max", "rank_memories_max"),
    *("requests_max", "results_under_way_max"),
}
"""Between ranks and their Training server, which no client sees; and the gateway's, whose callers
speak HTTP and have no capabilities of it."""
OFF_BY_DEFAULT = {"download_url_ttl_max"}
"""At 0 there is nothing of the kind."""
REFUSERS = {"over_limit": 1, "check_count": 2, "Budget": 0, "server_busy": 1, "too_many_models": 0}
"""What refuses for a limit, and which argument is its name."""


def limits_in_refusals() -> dict[str, str]:
    """Names of limits that the code gives in so many words, and where."""
    found = {}
    root = Path(tinsmithd.__path__[0])
    for file in sorted(root.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            place = REFUSERS.get(name)
            if place is not None and len(call.args) > place:
                limit = call.args[place]
                if isinstance(limit, ast.Constant) and isinstance(limit.value, str):
                    found[limit.value] = f"{file.relative_to(root)}:{call.lineno}"
    return found


def test_limits_of_one_name_have_one_number_and_one_type() -> None:
    """Below 16 a number has one meaning in all three services."""
    seen: dict[object, object] = {}
    for limits in LIMITS:
        for field in limits.fields:
            assert seen.setdefault(field.name, field.type) == field.type
            if field.number < SHARED_BELOW:
                assert seen.setdefault(field.number, field.name) == field.name
                assert seen.setdefault(f"number of {field.name}", field.number) == field.number


def test_capabilities_begin_alike() -> None:
    """Version and limits are the first two fields everywhere."""
    for message in CAPABILITIES:
        assert [field.name for field in message.fields[:2]] == ["server_version", "limits"]
        assert [field.number for field in message.fields[:2]] == [1, 2]


def test_every_limit_that_a_refusal_names_is_in_some_capabilities() -> None:
    """Whoever is refused can look up what is allowed."""
    told = {field.name for limits in LIMITS for field in limits.fields}
    named = limits_in_refusals()
    assert len(named) >= 15
    missing = {name: where for name, where in named.items() if name not in told | OF_ONE_PROCESS}
    assert not missing


@pytest.mark.parametrize(
    ("limits", "config"),
    [
        (v1.TrainingLimits, TrainingConfig()),
        (v1.SamplerLimits, SamplerConfig(base_model="any")),
        (v1.CheckpointLimits, CheckpointConfig()),
    ],
    ids=["training", "sampler", "checkpoint"],
)
def test_limits_are_those_of_the_settings(limits: type, config: object) -> None:
    """Each has the setting's value, and the setting's name but for the unit of a span of time."""
    others = {
        field.name: 7
        for field in limits.DESCRIPTOR.fields  # type: ignore[attr-defined]
        if not hasattr(config, field.name) and field.message_type is None
    }
    said = limit_values(limits_to_pb(limits, config, **others))  # type: ignore[type-var]
    for name, value in said.items():
        setting = name if hasattr(config, name) else setting_of(name)
        assert value > 0 or name.startswith(OF_TENANTS) or name in OFF_BY_DEFAULT
        if hasattr(config, setting):
            assert value == getattr(config, setting), name


@pytest.mark.parametrize(
    ("size", "expected"), [(0, PAGE_SIZE_DEFAULT), (1, 1), (PAGE_SIZE_MAX + 1, PAGE_SIZE_MAX)]
)
def test_a_page_size_is_a_wish(size: int, expected: int) -> None:
    """0 is the default, and too large is the largest (AIP-158)."""
    assert page_of(size, "") == Page(expected, None)
    assert page_of(size, token_after(12)) == Page(expected, 12)


@pytest.mark.parametrize(
    ("size", "token", "field"),
    [(-1, "", "page_size"), (1, "x", "page_token"), (1, "9" * 19, "page_token")],
)
def test_a_bad_page_is_refused_by_field(size: int, token: str, field: str) -> None:
    """A negative size, and a token that no server gave."""
    with pytest.raises(InvalidArgument) as refusal:
        page_of(size, token)
    assert refusal.value.field == field
