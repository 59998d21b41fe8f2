"""What v1 froze may only grow: `make lint` compares the contract with the golden one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
GOLDEN = PROTOS / "golden" / "tinsmith_v1.txtpb"
BUF = Path(sys.executable).parent / "buf"


def breaking(protos: Path) -> str:
    """What `make lint` says of a contract; empty where it is one that v1 may become."""
    command = [str(BUF), "breaking", "--path", "tinsmith/v1", "--against", str(GOLDEN)]
    done = subprocess.run(command, cwd=protos, capture_output=True, text=True, timeout=60)
    assert bool(done.returncode) == bool(done.stdout), done.stderr
    return done.stdout


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the contract with one change."""
    protos = folder / "protos"
    shutil.copytree(PROTOS, protos)
    place = protos / "tinsmith" / "v1" / file
    text = place.read_text()
    assert text.count(old) == 1
    place.write_text(text.replace(old, new))
    return protos


def test_the_contract_is_what_is_checked_in(tmp_path: Path) -> None:
    """It breaks nothing, and the file has all of it, so that what was added is held from now on."""
    assert not breaking(PROTOS)
    now = tmp_path / "now.txtpb"
    command = [str(BUF), "build", "--path", "tinsmith/v1", "--exclude-source-info", "-o", str(now)]
    subprocess.run(command, cwd=PROTOS, check=True, timeout=60)
    assert now.read_text() == GOLDEN.read_text(), "run 'make protos' and commit the result"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("types.proto", "  DTYPE_INT32 = 3;", "  DTYPE_INT32 = 9;", "Dtype"),
        ("types.proto", "  double alpha = 2;", "  float alpha = 2;", "alpha"),
        ("training_service.proto", "  string state_message = 7;", "", "state_message"),
        ("training_service.proto", "  int64 step_count = 8;", "  int64 steps = 8;", "step_count"),
        (
            "training_service.proto",
            "  rpc DeleteModel(DeleteModelRequest) returns (DeleteModelResponse);",
            "",
            "DeleteModel",
        ),
        ("sampler_service.proto", "  optional double top_p = 4;", "  double top_p = 4;", "top_p"),
        ("checkpoint_service.proto", "    ArchivePiece piece = 2;", "    bytes data = 2;", "piece"),
    ],
)
def test_a_change_that_breaks_a_program_fails(
    tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    """Numbers, types, names, presence, and what is gone: on the wire, in JSON and in stubs."""
    assert said in breaking(changed(tmp_path, file, old, new))


def test_a_field_may_be_added(tmp_path: Path) -> None:
    """v1 grows."""
    new = "  double alpha = 2;\n  // New.\n  double dropout = 70;"
    assert not breaking(changed(tmp_path, "types.proto", "  double alpha = 2;", new))
