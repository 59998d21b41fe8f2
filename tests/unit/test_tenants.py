"""Which tenants metrics name: as many as settings say, whoever comes."""

import threading

import pytest

from tinsmithd.config import CheckpointConfig, ConfigError, GatewaySettings
from tinsmithd.durations import Durations
from tinsmithd.owners import OWNER_PATTERN
from tinsmithd.tenants import NO_TENANTS, THE_REST, TenantCounter, Tenants


def test_others_have_names_in_the_order_in_which_they_come() -> None:
    """Chosen ones always; nobody loses a name to whoever comes later."""
    tenants = Tenants(["alice"], 2)
    assert [tenants.label(each) for each in ("bob", "alice", "carol", "dave", "bob")] == [
        *("bob", "alice", "carol", THE_REST, "bob")
    ]
    assert tenants.named() == ["alice", "bob", "carol"]
    assert not OWNER_PATTERN.fullmatch(THE_REST)


@pytest.mark.parametrize("name", ['a"b', "a\nb", "", "x" * 64, "(other)", "ä", "a{b}"])
def test_what_is_no_tenants_name_gets_none(name: str) -> None:
    """Whatever let it in."""
    assert Tenants(others_max=100).label(name) == THE_REST


def test_many_at_once_get_no_more_names_than_there_are() -> None:
    tenants = Tenants(others_max=5)
    threads = [
        threading.Thread(
            target=lambda first=first: [tenants.label(f"t{first}-{i}") for i in range(200)]
        )
        for first in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tenants.named()) == 5


def test_amounts_of_all_others_are_one() -> None:
    counter = TenantCounter(Tenants(["alice"]))
    for owner in ("alice", "bob", "carol"):
        counter.add(owner, 2)
    assert counter.amounts() == {"alice": 2, THE_REST: 4}
    off = TenantCounter(NO_TENANTS)
    off.add("alice", 1)
    assert off.amounts() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a, b"', "must be names of tenants"),
        (",".join(map(str, range(1001))), "must name at most 1000"),
    ],
)
def test_settings_that_name_no_tenants_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"metrics_tenants: {message}"):
        CheckpointConfig(metrics_tenants=text)
    assert GatewaySettings(metrics_tenants=" a,b.c ,").metrics_tenant_names == ("a", "b.c")


def test_durations_are_counted_up_to_their_bounds() -> None:
    """A bound is within itself, as Prometheus has it."""
    durations = Durations((0.5, 1.0))
    for seconds in (0.5, 0.75, 9.0):
        durations.add(seconds)
    assert durations.buckets() == [("0.5", 1), ("1.0", 2), ("+Inf", 3)]
    assert (durations.count, durations.sum_s) == (3, 10.25)
