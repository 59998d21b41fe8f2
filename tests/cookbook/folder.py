"""The folder that recipes run in: a tiny model and small data under the names that they ask for."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tiny_models import write_tiny_model

MODEL = "Qwen/Qwen3-8B-Base"
"""A name that the cookbook knows a renderer for without special tokens; here it is a tiny model."""
CONTEXT_LENGTH = 4096
WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "up"),
    *("hill", "to", "find", "some", "cold", "water"),
)


def write_folder(folder: Path) -> Path:
    """Write model and data; returns the model's folder."""
    model = write_tiny_model(folder / MODEL, "qwen3", context_length=CONTEXT_LENGTH)
    chats = [{"messages": _chat(index), "prompt": _text(index)} for index in range(48)]
    _rows(folder / "HuggingFaceH4/no_robots/train.jsonl", chats)
    _rows(folder / "HuggingFaceH4/no_robots/test.jsonl", chats[:8])
    pairs = [
        {"chosen": _dialogue(index, index + 1), "rejected": _dialogue(index, index + 2)}
        for index in range(48)
    ]
    _rows(folder / "Anthropic/hh-rlhf/train.jsonl", pairs)
    _rows(folder / "Anthropic/hh-rlhf/test.jsonl", pairs[:8])
    questions = [{"question": f"What is {index} + {index}?"} for index in range(48)]
    _rows(folder / "zwhe99/DeepMath-103K/train.jsonl", questions)
    choices = {"label": ["A", "B"], "text": ["water", "salt"]}
    facts = [
        {
            "question": f"{_text(index)}?",
            "choices": choices,
            "answerKey": "AB"[index % 2],
            "domain": "Chemistry",
            "details": {"level": "L3"},
            "type": "mcq-4-choices",
        }
        for index in range(48)
    ]
    _rows(folder / "hicai-zju/SciKnowEval/test.jsonl", facts)
    _rows(folder / "chats.jsonl", chats)
    return model


def _text(index: int) -> str:
    return " ".join(WORDS[(index * 5 + step) % len(WORDS)] for step in range(6))


def _chat(index: int) -> list[Mapping[str, str]]:
    return [
        {"role": "user", "content": _text(index)},
        {"role": "assistant", "content": _text(index + 1)},
    ]


def _dialogue(index: int, answer: int) -> str:
    return f"\n\nHuman: {_text(index)}?\n\nAssistant: {_text(answer)}."


def _rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
