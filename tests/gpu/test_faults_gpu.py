"""What a GPU and NCCL say when something is wrong, and that it is understood."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky
from tinsmithd.trainer.process_group import distributed

LOST = """
import torch
from tinsmithd.modeling.device_errors import is_out_of_memory, is_sticky

row = torch.zeros(1, device="cuda")
found = []
for _ in range(2):
    try:
        row[torch.tensor([5], device="cuda")]
        torch.cuda.synchronize()
    except RuntimeError as error:
        found.append((is_sticky(error), is_out_of_memory(error)))
assert found == [(True, False)] * 2, found
"""


def test_a_lack_of_memory_is_known_and_the_process_goes_on() -> None:
    """As torch says it of an allocation."""
    with pytest.raises(RuntimeError) as lacking:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(lacking.value)
    assert not is_sticky(lacking.value)
    assert float(torch.ones(1, device="cuda")) == 1


def test_a_lost_device_is_known_each_time_that_it_is_used() -> None:
    """In a process of its own, which cannot use it any more."""
    subprocess.run([sys.executable, "-c", LOST], check=True)


def test_the_flight_recorder_of_nccl_says_what_was_last(caplog: pytest.LogCaptureFixture) -> None:
    """By its name, as the log of ranks that hang has it."""
    distributed.init()
    dist.all_reduce(torch.ones(1, device="cuda"))
    with caplog.at_level(logging.ERROR):
        distributed._log_collectives(0)
    assert "nccl:all_reduce" in caplog.text
