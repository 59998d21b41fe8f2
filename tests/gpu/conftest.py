"""Marks what is in this folder; without a GPU it is skipped, and the summary says so in a line."""

import sys
from pathlib import Path

import pytest
import torch

# What ranks run there they run here.
sys.path.append(str(Path(__file__).parents[1] / "conformance"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests (the hook is given all that were collected)."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                reason = "NO GPU HERE: nothing of tests/gpu was checked"
                item.add_marker(pytest.mark.skip(reason=reason))
