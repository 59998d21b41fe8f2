"""The surface of Tinker's SDK, as it was recorded, is this client's; what is not there says so."""

import inspect
import json
from typing import Any

import pytest

import tinsmith
import tinsmith.tinker
from surface.comparing import CLIENTS, RECORDED, compare, taken
from surface.listing import parameters

RECORD = json.loads(RECORDED.read_text())
REFUSED_MAX = 6
"""Members of the clients that only say that they are not supported. It may go down."""


def test_every_name_and_signature_of_the_sdk_is_here() -> None:
    """All exports, all types, and all members of classes, each with a signature that fits."""
    found = compare(RECORD)
    assert not found.missing
    assert not found.different
    assert found.total > 700


def test_no_method_of_a_client_is_refused_that_was_not() -> None:
    assert len(compare(RECORD, CLIENTS).refused) <= REFUSED_MAX


def test_a_comparison_sees_what_is_missing_and_what_differs() -> None:
    """Planted: a class, a member, an export, and a parameter that nobody has."""
    planted = {
        "exports": ["ServiceClient", "Nothing"],
        "types": ["Datum", "Nobody"],
        "classes": {
            "Datum": {"model_input": "value", "nowhere": "value"},
            "RestClient": {"list_sessions": ["limit=", "nothing="]},
        },
    }
    found = compare(planted)
    assert found.missing == ["tinker.Nothing", "tinker.types.Nobody", "Datum.nowhere"]
    assert [name.partition(":")[0] for name in found.different] == ["RestClient.list_sessions"]


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        (["a", "b="], ["a"], True),
        (["a", "b"], ["a"], False),
        (["b", "a"], ["a", "b"], False),
        (["*", "a="], ["a="], False),
        (["a="], ["*", "a"], True),
        (["*args", "**kwargs"], ["a", "*", "b="], True),
        ("property", ["a"], False),
        ("property", "value", True),
    ],
)
def test_a_signature_fits_where_every_call_does(ours: Any, theirs: Any, fits: bool) -> None:
    assert taken(ours, theirs) == fits


def refusing() -> list[tuple[str, str]]:
    return [tuple(name.split(".")) for name in compare(RECORD, CLIENTS).refused]  # type: ignore[misc]


def use(owner: Any, name: str) -> None:
    """Read a property, or call a method with as many arguments as it needs."""
    found = getattr(owner, name)
    needed = [each for each in parameters(found) or () if each[-1] != "=" and each != "*"]
    found(*("x" for _ in needed))


@pytest.mark.parametrize(("cls", "name"), refusing())
def test_what_is_refused_says_its_name_and_what_to_do(cls: str, name: str) -> None:
    """At once, with `status_code` 501, and never an AttributeError."""
    clients: dict[str, Any] = {
        "ServiceClient": lambda: tinsmith.ServiceClient(base_url="127.0.0.1:1"),
        "RestClient": lambda: tinsmith.RestClient(base_url="127.0.0.1:1"),
        "AdminClient": lambda: tinsmith.AdminClient(base_url="127.0.0.1:1"),
        "TrainingClient": lambda: object.__new__(tinsmith.TrainingClient),
        "SamplingClient": lambda: object.__new__(tinsmith.SamplingClient),
    }
    owner = clients[cls]()
    with pytest.raises(tinsmith.UnimplementedError) as refusal:
        use(owner, name)
    assert name.removesuffix("_async") in str(refusal.value)
    assert refusal.value.status_code == 501
    assert len(str(refusal.value)) > len(name) + 20


def test_attributes_of_clients_can_be_listed() -> None:
    """By inspect, by doc tools and by mocks: what is refused is refused when it is used."""
    service = tinsmith.ServiceClient(base_url="127.0.0.1:1")
    assert "create_lora_training_client" in dict(inspect.getmembers(service, inspect.ismethod))
    with pytest.raises(tinsmith.UnimplementedError, match=r"holder\.anything"):
        _ = service.holder.anything


def test_types_without_support_are_refused_by_their_names() -> None:
    """They can be imported and stand in annotations; to make one is refused."""
    from tinsmith.types.unsupported import UNSUPPORTED

    for name in UNSUPPORTED:
        made = getattr(tinsmith.types, name)
        assert inspect.isclass(made)
        with pytest.raises(tinsmith.UnimplementedError, match=name):
            made(anything=1)
