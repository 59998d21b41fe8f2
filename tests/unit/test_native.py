"""The compiled kernels: products whose bits are a row's own, and where libraries are taken from."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tinsmithd.sampler.engines.transformers.model.lora_weights import Turning, turned
from tinsmithd.sampler.engines.transformers.native import compiling as room
from tinsmithd.sampler.engines.transformers.native.abi import GroupOf, Library, Matrix, SiteOf
from tinsmithd.sampler.engines.transformers.native.draws import NativeWorkspace
from tinsmithd.sampler.engines.transformers.sampling import Distributions, Workspace

SHAPES = ((48, 32), (131, 259), (7, 5), (96, 64), (70, 1088))
ROWS_MAX = 33


@pytest.fixture(scope="module", params=room.usable_variants())
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    made = Library(room.compiled(request.param, room.kept_in("")), 2)
    yield made
    made.close()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_among_any_number(
    library: Library, shape: tuple[int, int], narrow: bool
) -> None:
    """At the first, the last and any other place of 1 to 33 rows; and they are the right ones."""
    weight, bias = random(*shape).bfloat16().float(), random(shape[0], seed=1)
    panels = library.packed(weight, narrow=narrow)
    matrix = Matrix(panels.data_ptr(), bias.data_ptr(), *shape, narrow)
    rows = random(ROWS_MAX, shape[1], seed=2)
    every = library.product(matrix, rows)
    torch.testing.assert_close(every, rows @ weight.T + bias, atol=1e-4, rtol=1e-4)
    for count in range(1, ROWS_MAX + 1):
        assert torch.equal(library.product(matrix, rows[:count]), every[:count])
        assert torch.equal(library.product(matrix, rows[-count:]), every[-count:])


def test_products_of_narrow_weights_are_exact_float32(library: Library) -> None:
    """Also where a processor multiplies bfloat16 alone: rows lose nothing, small and large."""
    weight = random(96, 1536).bfloat16().float()
    rows = random(40, 1536, seed=1) * 10.0 ** torch.linspace(-30, 30, 40)[:, None]
    panels = library.packed(weight, narrow=True)
    found = library.product(Matrix(panels.data_ptr(), None, 96, 1536, True), rows)
    exact = rows.double() @ weight.double().T
    scale = rows.double().abs() @ weight.double().abs().T
    assert ((found - exact).abs() / scale).max() <= 2**-22


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_are_bfloat16_lose_nothing_either(
    library: Library, shape: tuple[int, int]
) -> None:
    """They are one part on processors that multiply bfloat16; bits are a row's own there too."""
    weight, bias = random(*shape).bfloat16().float(), random(shape[0], seed=1)
    panels = library.packed(weight, narrow=True)
    matrix = Matrix(panels.data_ptr(), bias.data_ptr(), *shape, True)
    rows = random(ROWS_MAX, shape[1], seed=2).bfloat16().float()
    every = library.product(matrix, rows, narrow=True)
    exact = rows.double() @ weight.double().T + bias
    scale = rows.double().abs() @ weight.double().abs().T + bias.abs()
    assert ((every - exact).abs() / scale).max() <= 2**-21
    for count in range(1, ROWS_MAX + 1):
        assert torch.equal(library.product(matrix, rows[:count], narrow=True), every[:count])
        assert torch.equal(library.product(matrix, rows[-count:], narrow=True), every[-count:])


def test_other_libraries_of_the_thread_find_what_they_left(library: Library) -> None:
    """Shapes of tiles are a thread's, and torch expects those that it has set itself."""
    weight, rows = random(64, 64).bfloat16().float(), random(20, 64, seed=1)
    panels = library.packed(weight, narrow=True)
    matrix = Matrix(panels.data_ptr(), None, 64, 64, True)
    own = [random(*shape, seed=2).bfloat16() for shape in ((40, 192), (80, 192))]
    first, expected = library.product(matrix, rows), own[0] @ own[1].T
    for _ in range(3):
        assert torch.equal(own[0] @ own[1].T, expected)
        assert torch.equal(library.product(matrix, rows), first)


def test_both_forms_of_a_weight_give_the_same_bits(library: Library) -> None:
    """A bfloat16 weight is a float32 one with less to read; its k is not one of tiles here."""
    weight, rows = random(131, 259).bfloat16().float(), random(5, 259, seed=1)
    found = []
    for narrow in (True, False):
        panels = library.packed(weight, narrow=narrow)
        found.append(library.product(Matrix(panels.data_ptr(), None, 131, 259, narrow), rows))
    assert torch.equal(*found)


@pytest.mark.parametrize("n", [40, 131])
def test_an_adapter_adds_to_its_own_rows_alone(library: Library, n: int) -> None:
    """Of two parts; with the same bits whatever other rows have it."""
    weight, rows, rank = random(n, 64), random(9, 64, seed=1), 16
    a, b = random(64, 2 * rank, seed=2), random(2 * rank, n, seed=3)
    widths = (n // 3, n - n // 3)
    b[:rank, widths[0] :] = b[rank:, : widths[0]] = 0
    panels = library.packed(weight, narrow=False)
    matrix = Matrix(panels.data_ptr(), None, n, 64, False)
    site = SiteOf(a.data_ptr(), b.data_ptr(), 2, rank)
    site.widths[:2] = widths

    def with_adapter(own: list[int]) -> torch.Tensor:
        index = torch.tensor(own, dtype=torch.int32)
        groups = (GroupOf * 1)(GroupOf((SiteOf * 1)(site), index.data_ptr(), len(own)))
        return library.product(matrix, rows, groups)

    plain, all_own, few = library.product(matrix, rows), with_adapter([*range(9)]), [1, 4, 8]
    torch.testing.assert_close(all_own, plain + rows @ a @ b, atol=1e-3, rtol=1e-4)
    found = with_adapter(few)
    others = [row for row in range(9) if row not in few]
    assert torch.equal(found[few], all_own[few])
    assert torch.equal(found[others], plain[others])


def test_a_library_that_others_could_have_written_is_not_taken(tmp_path: Path) -> None:
    """Nor one in such a folder, nor a link; the line for a person says which."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    said: list[str] = []
    assert room.load_library(str(folder), 1, on_progress=said.append) is None
    assert len(said) == 1
    assert "can be written by others" in said[0]
    (tmp_path / "link").symlink_to("/usr")
    with pytest.raises(PermissionError, match="link"):
        room.check_private(tmp_path / "link")


def test_without_a_compiler_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails, one that is not there; what was made before is taken without."""
    variant = room.usable_variants()[0]
    kept = room.compiled(variant, room.kept_in(""))
    said: list[str] = []
    monkeypatch.setenv("CC", "false")
    assert room.load_library(str(tmp_path), 1, on_progress=said.append) is None
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert room.load_library(str(tmp_path), 1, on_progress=said.append) is None
    assert "the compiler failed" in said[0]
    assert "no C compiler" in said[1]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".so"]
    made = tmp_path / kept.name
    made.write_bytes(kept.read_bytes())
    found = room.load_library(str(tmp_path), 1, on_progress=said.append)
    assert found is not None
    found.close()
    assert len(said) == 2


def test_without_a_home_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry: torch computes, and nothing ends."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    said: list[str] = []
    assert room.load_library("", 1, on_progress=said.append) is None
    assert "home directory" in said[0]


def test_a_file_that_is_no_library_is_none(tmp_path: Path) -> None:
    """Half a file, as a crash could leave where files are written in place."""
    name = room.compiled(room.usable_variants()[0], room.kept_in("")).name
    (tmp_path / name).write_bytes(b"\x7fELF")
    said: list[str] = []
    assert room.load_library(str(tmp_path), 1, on_progress=said.append) is None
    assert said
    assert os.fspath(tmp_path) in said[0]


@pytest.mark.parametrize("vocab", [320, 130, 49152])
def test_weights_of_draws_are_those_of_torch(library: Library, vocab: int) -> None:
    """To 1e-6, at any temperature; what cannot be drawn has none; a row's bits are its own."""
    logits, inverse = random(5, vocab) * 8, torch.tensor([1.0, 2.0, 0.5, 1e38, 1e-30])
    logits[:, 7] = -torch.inf
    found = NativeWorkspace(library).weigh(logits, inverse)
    expected = Workspace().weigh(logits, inverse)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other.double(), atol=1e-6, rtol=1e-6)
    assert not found[0].view(5, -1)[:, [7, *range(vocab, found[0][0].numel())]].any()
    for row in range(5):
        alone = NativeWorkspace(library).weigh(logits[row : row + 1], inverse[row : row + 1])
        for own, every in zip(alone, found, strict=True):
            assert torch.equal(own[0], every[row])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 63, 299])
def test_logits_that_are_no_distribution_have_no_finite_sum(
    library: Library, wrong: float, place: int
) -> None:
    logits = random(2, 300)
    logits[0, place] = wrong
    if wrong == -torch.inf:
        logits[0] = wrong
    every = Distributions(logits, [1.0, 1.0], NativeWorkspace(library))
    assert every.finite_N.tolist() == [False, True]


@pytest.mark.parametrize(
    "shape", [(16, 576), (576, 16), (4, 4), (9, 17), (1, 40), (40, 1), (23, 8)]
)
def test_matrices_are_turned_round_into_columns_of_their_own(
    library: Library, shape: tuple[int, int]
) -> None:
    """With the bits that numpy has, and nothing beside them is touched."""
    given = [random(*shape, seed=seed).numpy() for seed in range(2)]
    rooms = [np.full((shape[1], 2 * shape[0] + 3), np.nan, np.float32) for _ in range(2)]
    for turn, room_of in zip((library.turn, turned), rooms, strict=True):
        places = [room_of[:, at : at + shape[0]] for at in (1, shape[0] + 2)]
        turn([Turning(given[0], places[0], 0.3), Turning(given[1], places[1], 1.0)])
    assert np.array_equal(rooms[0].view(np.uint32), rooms[1].view(np.uint32))
    assert np.array_equal(rooms[1][:, shape[0] + 2 : -1], given[1].T)
    assert np.isnan(rooms[1]).sum() == 3 * shape[1]
