"""What control groups leave: both versions, in a container and outside, as files have it."""

from pathlib import Path

import pytest

from tinsmithd.trainer.compute.container import free_bytes

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
UNLIMITED = "9223372036854771712"
"""How version 1 says it."""


def group(folder: Path, version: tuple[str, str, str], limit: object, used: int, dropped: int = 0):
    """The files of a group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (version[0], limit),
        (version[1], used),
        ("memory.stat", f"cache 7\n{version[2]} {dropped}\nactive_file 9"),
    ):
        (folder / name).write_text(f"{text}\n")


def free(tmp_path: Path, *lines: str) -> int | None:
    membership = tmp_path / "cgroup"
    membership.write_text("".join(f"{line}\n" for line in lines))
    return free_bytes(membership, tmp_path / "sys")


@pytest.mark.parametrize(
    ("version", "folder", "line"),
    [(V2, "sys", "0::/"), (V1, "sys/memory", "4:memory:/"), (V1, "sys/memory", "4:cpu,memory:/")],
)
def test_a_limit_less_what_is_used(
    tmp_path: Path, version: tuple[str, str, str], folder: str, line: str
) -> None:
    """Pages of files that the kernel would drop are free, too."""
    group(tmp_path / folder, version, 1000, 600, 150)
    assert free(tmp_path, "9:pids:/", line) == 550


def test_version_1_in_a_container_that_sees_the_hosts_paths(tmp_path: Path) -> None:
    """The path is that of the host, and what is mounted is the container's own group."""
    group(tmp_path / "sys" / "memory", V1, 1000, 600)
    assert free(tmp_path, "4:memory:/kubepods/burstable/pod1/c2", "0::/") == 400


@pytest.mark.parametrize(("outer", "inner", "expected"), [(1000, 300, 50), (500, 300, -1)])
def test_the_tightest_of_nested_groups_counts(
    tmp_path: Path, outer: int, inner: int, expected: int
) -> None:
    """Such as a job scheduler's: a step within a job."""
    group(tmp_path / "sys" / "memory", V1, UNLIMITED, 9000)
    group(tmp_path / "sys" / "memory" / "job", V1, outer, 550)
    group(tmp_path / "sys" / "memory" / "job" / "step", V1, inner, 250)
    assert free(tmp_path, "4:memory:/job/step") == max(0, expected)


def test_no_limit_is_no_number_of_ours(tmp_path: Path) -> None:
    """Of version 2; version 1 says a number that is beyond every machine's memory."""
    group(tmp_path / "sys", V2, "max", 600)
    assert free(tmp_path, "0::/user.slice") is None
    group(tmp_path / "sys" / "memory", V1, UNLIMITED, 600)
    found = free(tmp_path, "0::/user.slice", "4:memory:/")
    assert found is not None
    assert found > 2**62


def test_without_control_groups_nothing_is_said(tmp_path: Path) -> None:
    """Such as on macOS."""
    assert free_bytes(tmp_path / "absent", tmp_path / "sys") is None
    assert free(tmp_path, "0::/") is None
