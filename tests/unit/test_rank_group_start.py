"""What the end of ranks says of their group."""

import pytest

from tinsmithd.trainer.process_group.starter import group_status


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([-9, 75], 137),
        ([75, -9], 137),
        ([75, -11], 139),
        ([-9, -6], 137),
        ([75], 75),
        ([1, 75], 1),
        ([76, -9], 76),
        ([-9, 78], 78),
        ([143, 75], 143),
    ],
)
def test_the_first_cause_is_the_groups(statuses: list[int], expected: int) -> None:
    """Not the status of those that only followed; 76: one fell silent; 78: a restart cannot
    help."""
    assert group_status(statuses) == expected
