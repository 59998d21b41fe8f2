"""What was released may only grow: `make lint` compares contract and link with golden ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
GOLDEN = {"v1": "tinsmith_v1.txtpb", "internal/v1": "tinsmith_internal_v1.txtpb"}
LINK = "../internal/v1/trainer_link_service.proto"
BUF = Path(sys.executable).parent / "buf"


def breaking(protos: Path, part: str = "v1") -> str:
    """What `make lint` says of a contract; empty where it is one that v1 may become."""
    golden = PROTOS / "golden" / GOLDEN[part]
    command = [str(BUF), "breaking", "--path", f"tinsmith/{part}", "--against", str(golden)]
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


@pytest.mark.parametrize("part", GOLDEN)
def test_the_contract_is_what_is_checked_in(tmp_path: Path, part: str) -> None:
    """It breaks nothing, and the file has all of it, so that what was added is held from now on."""
    assert not breaking(PROTOS, part)
    now, path = tmp_path / "now.txtpb", f"tinsmith/{part}"
    command = [str(BUF), "build", "--path", path, "--exclude-source-info", "-o", str(now)]
    subprocess.run(command, cwd=PROTOS, check=True, timeout=60)
    golden = (PROTOS / "golden" / GOLDEN[part]).read_text()
    assert now.read_text() == golden, "run 'make protos' and commit the result"


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
        (LINK, "  int32 world_size = 2;", "  int64 world_size = 2;", "world_size"),
        (LINK, "    Leaving leaving = 10;", "    Leaving leaving = 11;", "leaving"),
    ],
)
def test_a_change_that_breaks_a_program_fails(
    tmp_path: Path, file: str, old: str, new: str, said: str
) -> None:
    """Numbers, types, names, presence, and what is gone: on the wire, in JSON and in stubs."""
    part = "internal/v1" if file == LINK else "v1"
    assert said in breaking(changed(tmp_path, file, old, new), part)


def test_a_field_may_be_added(tmp_path: Path) -> None:
    """v1 grows."""
    new = "  double alpha = 2;\n  // New.\n  double dropout = 70;"
    assert not breaking(changed(tmp_path, "types.proto", "  double alpha = 2;", new))
