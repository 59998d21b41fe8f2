"""When a GPU is told to give the same bits each time; none is needed to decide it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinsmithd.config import ConfigError
from tinsmithd.trainer.compute import determinism
from tinsmithd.trainer.compute.determinism import COST_MAX, Determinism, Wanted
from tinsmithd.trainer.engines import identity

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def switched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What torch was told; it is told so in earnest, and afterwards nothing."""
    said: list[bool] = []
    real = determinism.switch

    def switch(on: bool) -> None:
        said.append(on)
        real(on)

    monkeypatch.setattr(determinism, "switch", switch)
    yield said
    real(False)


def trial_that_costs(factor: float) -> tuple[list[float], determinism.Trial]:
    """A clock, and a trial during which it goes on by a second, and more where order is kept."""
    now = [0.0]

    def run() -> None:
        first = not now[0]
        now[0] += factor if torch.are_deterministic_algorithms_enabled() else 1.0
        now[0] += 50.0 if first else 0.0  # kernels are loaded

    return now, run


@pytest.mark.parametrize("factor", [0.9, 1.04, 1.5])
def test_the_cost_is_a_ratio_without_the_first_run(factor: float) -> None:
    """What loads in the first run is nobody's cost."""
    now, run = trial_that_costs(factor)
    assert determinism.cost(run, lambda: now[0]) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("wanted", "factor", "taken"),
    [
        ("auto", COST_MAX - 0.01, True),
        ("auto", COST_MAX + 0.01, False),
        ("always", 3.0, True),
        ("never", 0.9, False),
    ],
)
def test_it_is_taken_where_it_is_wanted_or_cheap(
    wanted: Wanted,
    factor: float,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And torch is left in that state; the log says what it costs."""
    monkeypatch.setattr(determinism, "cost", lambda _: factor)
    with caplog.at_level("INFO"):
        assert Determinism(wanted).decide(GPU, lambda: lambda: None) is taken
    assert torch.are_deterministic_algorithms_enabled() is taken
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if wanted != "never":
        assert f"{100 * (factor - 1):+.1f} %" in caplog.text


def test_what_fails_in_order_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Unless it must be: then the process says which setting cannot be had."""

    def fails() -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("op_x does not have a deterministic implementation\nmore")

    assert not Determinism("auto").decide(GPU, lambda: fails)
    assert "op_x does not have" in caplog.text
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ConfigError, match=r"trainer\.deterministic: .*op_x does not have"):
        Determinism("always").decide(GPU, lambda: fails)


def test_a_lost_device_is_no_reason_to_go_on() -> None:
    """Whatever was wanted."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Determinism("auto").decide(GPU, lambda: lost)


def test_a_process_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that takes the place of the first does as that said, however long it takes now."""
    factors = [1.0, 2.0]
    monkeypatch.setattr(determinism, "cost", lambda _: factors.pop(0))
    decided = Determinism("auto")
    assert decided.decide(GPU, lambda: lambda: None)
    assert decided.decide(GPU, lambda: lambda: None)
    assert factors == [2.0]


def test_a_processor_is_not_asked(switched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same bits anyway; nothing is tried, switched or set."""
    monkeypatch.delenv(determinism.CUBLAS_WORKSPACE[0], raising=False)

    def never() -> determinism.Trial:
        raise AssertionError("tried")

    assert not Determinism("always").decide(torch.device("cpu"), never)
    assert switched == []
    if not torch.cuda.is_available():
        determinism.prepare()
        assert determinism.CUBLAS_WORKSPACE[0] not in determinism.os.environ


def test_cublas_is_prepared_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody chose."""
    name, value = determinism.CUBLAS_WORKSPACE
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(name, raising=False)
    determinism.prepare()
    assert determinism.os.environ[name] == value
    monkeypatch.setenv(name, ":16:8")
    determinism.prepare()
    assert determinism.os.environ[name] == ":16:8"


def test_a_later_release_that_computes_the_same_bits_is_no_other_kind_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else no call of before an upgrade could be made again; another transformers may be one."""
    info = SimpleNamespace(dtype="float32", active_expert_count=0)
    config = SimpleNamespace(layer_types=None, sliding_window=None)
    base: Any = SimpleNamespace(fingerprint="f", info=info, model=SimpleNamespace(config=config))
    version = identity.metadata.version

    def found() -> Any:
        return identity.describe("reference", base, torch.device("cpu"))

    before = found()
    monkeypatch.setattr(
        identity.metadata, "version", lambda name: "9" if name == "tinsmith" else version(name)
    )
    assert found() == before
    monkeypatch.setattr(
        identity.metadata, "version", lambda name: "9" if name == "peft" else version(name)
    )
    assert found() != before
