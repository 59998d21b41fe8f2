"""What clients call base models."""

import pytest

from tinsmithd.gateway.names import BaseModelNames
from tinsmithd.gateway.problems import Problem

HELD = ["Qwen3-4B-2507", "meta/Llama-3-8B"]
NAMES = BaseModelNames(
    {
        "Qwen/Qwen3-4B-Instruct-2507": "/models/Qwen3-4B-2507",
        "small": "Qwen3-4B-2507",
        "llama": "meta/Llama-3-8B",
        "gone/model": "a-model-that-nobody-holds",
    },
    {"Qwen3-4B-2507": "/home/me/models/Qwen3-4B-2507"},
)


@pytest.mark.parametrize(
    ("said", "served"),
    [
        ("Qwen3-4B-2507", "Qwen3-4B-2507"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B-2507"),
        ("Qwen/Qwen3-4B-Instruct-2507:peft", "Qwen3-4B-2507"),
        ("Qwen/Qwen3-4B-Instruct-2507/fast", "Qwen3-4B-2507"),
        ("small", "Qwen3-4B-2507"),
        ("/home/me/models/Qwen3-4B-2507", "Qwen3-4B-2507"),
        ("llama", "meta/Llama-3-8B"),
        ("meta/Llama-3-8B:16k", "meta/Llama-3-8B"),
    ],
)
def test_a_model_has_its_own_name_its_aliases_and_its_tokenizers_id(said: str, served: str) -> None:
    assert NAMES.served(said, HELD) == served


@pytest.mark.parametrize(
    "said",
    ["", "Qwen", "gone/model", "a-model-that-nobody-holds", "other/Qwen3-4B-2507", ":peft", "/a/b"],
)
def test_a_model_that_is_not_held_is_refused_with_the_names_that_are(said: str) -> None:
    with pytest.raises(Problem) as refused:
        NAMES.served(said, HELD)
    assert (refused.value.status, refused.value.reason) == (404, "BASE_MODEL_NOT_FOUND")
    for name in ("Qwen/Qwen3-4B-Instruct-2507", "small", "Qwen3-4B-2507", "meta/Llama-3-8B"):
        assert name in refused.value.message
    assert "gone/model'; there" in refused.value.message or "gone" not in refused.value.message


def test_nothing_is_held_yet() -> None:
    with pytest.raises(Problem, match="none yet"):
        NAMES.served("small", [])


def test_clients_are_told_the_first_alias_and_what_loads_its_tokenizer() -> None:
    assert NAMES.public("Qwen3-4B-2507") == "Qwen/Qwen3-4B-Instruct-2507"
    assert NAMES.public("unknown") == "unknown"
    assert NAMES.tokenizer_id("Qwen3-4B-2507") == "/home/me/models/Qwen3-4B-2507"
    assert NAMES.tokenizer_id("meta/Llama-3-8B") == "meta/Llama-3-8B", "a hub knows no llama"
    assert NAMES.tokenizer_id("unknown") == "unknown"
    assert NAMES.all(HELD) == [
        "Qwen/Qwen3-4B-Instruct-2507",
        "small",
        "Qwen3-4B-2507",
        "llama",
        "meta/Llama-3-8B",
    ]


def test_a_name_of_a_caller_is_cut_and_escaped_before_it_is_shown() -> None:
    with pytest.raises(Problem) as refused:
        NAMES.served("x\n" * 100_000, HELD)
    assert len(refused.value.message) < 700
    assert "\n" not in refused.value.message
