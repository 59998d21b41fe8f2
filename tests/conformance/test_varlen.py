"""Packed attention as one kernel: the numbers of the loop, and as many operations for any data.

The kernels need a GPU (`tests/gpu/test_varlen_gpu.py`). Here one with the signature of torch's
takes its place and computes by plain products, so what is tested is everything around it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from data import collect
from engines import make_engine
from tinsmithd.domain import Datum, LoraConfig
from tinsmithd.modeling import packing, varlen
from tinsmithd.modeling.varlen import Compute, Kernel, Shape
from tiny_models import write_tiny_model

SHAPE = Shape(heads=4, kv_heads=2, head_size=8)


def probabilities(
    q: Tensor, k: Tensor, starts: Tensor, key_starts: Tensor, scale: float, window: int
) -> Tensor:
    """`(heads, T, S)`; `window` is -1, or how many tokens before itself a token sees. The queries
    of a segment are those of its last keys."""
    places, segments = [], []
    for rows, begins in ((q, starts.long()), (k, key_starts.long())):
        place = torch.arange(len(rows))
        segments.append(torch.searchsorted(begins, place, right=True) - 1)
        places.append(place - begins[segments[-1] + 1])  # from its segment's end
    distance = places[0][:, None] - places[1][None]
    seen = (segments[0][:, None] == segments[1][None]) & (distance >= 0)
    if window >= 0:
        seen &= distance <= window
    scores = torch.einsum("thd,shd->hts", q, in_groups(k, q)) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def in_groups(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values once for each head of the queries."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """By one table of scores."""
    p = probabilities(q, k, starts, key_starts, scale, window)
    return torch.einsum("hts,shd->thd", p, in_groups(v, q))


@library.custom_op("tinsmith_tests::attend", mutates_args={})
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return attend(q, k, v, starts, key_starts, scale, window)


@library.custom_op("tinsmith_tests::attend_back", mutates_args={})
def _attend_back(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    p = probabilities(q, k, starts, key_starts, scale, window)
    d_p = torch.einsum("thd,shd->hts", g, in_groups(v, q))
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
    d_q = torch.einsum("hts,shd->thd", d_scores, in_groups(k, q))
    d_k, d_v = (
        torch.einsum("hts,thd->shd", table, rows).unflatten(1, (k.shape[1], -1)).sum(2)
        for table, rows in ((d_scores, q), (p, g))
    )
    return d_q, d_k, d_v


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx: Any, g: Tensor) -> Any:
    return (
        *_attend_back(g.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.window),
        None,
        None,
        None,
        None,
    )


_attend.register_autograd(_back, setup_context=_keep)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """In the place of torch's; one operation, as that is."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0  # nobody sees what comes later
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel is there, and it serves this device and dtype."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)

    def choose(device: torch.device, dtype: torch.dtype, shape: Shape, loop: Any) -> Kernel | None:
        differs = partial(varlen.difference, device, dtype, shape, loop)
        return varlen.first_that_works(varlen.KERNELS, differs)

    monkeypatch.setattr(varlen, "choose", choose)


def datum(length: int, seed: int) -> Datum:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=length).astype(np.float32)
    targets = rng.integers(0, 256, length)
    return Datum(rng.integers(0, 256, length), {"target_tokens": targets, "weights": weights})


def data(lengths: Sequence[int]) -> list[Datum]:
    return [datum(length, seed) for seed, length in enumerate(lengths)]


UNEVEN = [1 + 7 * i % 23 for i in range(32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads in groups, a layer with a window."""
    return write_tiny_model(
        *(tmp_path_factory.mktemp("varlen") / "model", "qwen3"),
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=6,
    )


def trained(folder: Path, **settings: Any) -> tuple[Any, list[np.ndarray], np.ndarray]:
    """An engine; logprobs and gradients of one call of 32 data together."""
    engine = make_engine("deepspeed", str(folder), **settings)
    engine.create_model("m", LoraConfig(rank=4, seed=7))
    _, logprobs = collect(engine, "m", data(UNEVEN), backward=True)
    gradients = engine.engine._models.get("m").pending.copy().numpy()
    return engine, logprobs, gradients


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_gives_the_numbers_of_the_loop(
    folder: Path, stage: int, request: pytest.FixtureRequest
) -> None:
    """Logprobs and gradients to 1e-5; ranks say which kernel they have, as numbers depend on it."""
    plain, by_loop, gradients = trained(folder, zero_stage=stage)
    assert "attention_kernel" not in plain.identity
    request.getfixturevalue("stand_in")
    engine, by_kernel, own = trained(folder, zero_stage=stage)
    assert engine.identity == {**plain.identity, "attention_kernel": "torch varlen"}
    for ours, theirs in zip(by_kernel, by_loop, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(own, gradients, atol=1e-5 * np.abs(gradients).max())


class Counted(TorchDispatchMode):
    """Counts operations that do something: a view is none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(folder: Path, lengths: Sequence[int]) -> int:
    """Of a forward and a backward pass."""
    engine = make_engine("deepspeed", str(folder), micro_batch_tokens_max=10**6)
    engine.create_model("m", LoraConfig(rank=4, seed=7))
    collect(engine, "m", data(lengths), backward=True)
    with Counted() as counted:
        collect(engine, "m", data(lengths), backward=True)
    return counted.count


@pytest.fixture
def per_layer(tmp_path: Path) -> Callable[[Sequence[int]], float]:
    """Operations of one layer: two models that differ in nothing but how many they have."""
    few, more = (
        write_tiny_model(tmp_path / str(n), "qwen3", num_hidden_layers=n, context_length=1024)
        for n in (1, 3)
    )
    return lambda lengths: (operations(more, lengths) - operations(few, lengths)) / 2


def test_a_layer_has_as_many_operations_for_one_datum_as_for_32(
    per_layer: Callable[[Sequence[int]], float], request: pytest.FixtureRequest
) -> None:
    """Of as many tokens; at most a tenth more. The loop has half as many again, and more."""
    of_loop = per_layer(UNEVEN)
    request.getfixturevalue("stand_in")
    one = per_layer([sum(UNEVEN)])
    assert per_layer(UNEVEN) / one <= 1.1
    assert of_loop / one > 1.5


# --- which one serves -----------------------------------------------------------------------------


def kernel(name: str, compute: Compute) -> Callable[[], Kernel]:
    return lambda: Kernel(name, compute)


def right(*inputs: Any, scale: float | None, window: int | None) -> Tensor:
    """As torch's, by the stand-in."""
    q, k, v, starts, key_starts, _, _ = inputs
    before = -1 if window is None else window - 1
    return attend(q, k, v, starts, key_starts, q.shape[-1] ** -0.5, before)


def too_wide(*inputs: Any, scale: float | None, window: int | None) -> Tensor:
    """Sees one token more than a window has."""
    return right(*inputs, scale=scale, window=None if window is None else window + 1)


def broken(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def nothing(*inputs: Any, scale: float | None, window: int | None) -> Tensor:
    """No number at all."""
    return right(*inputs, scale=scale, window=window) * torch.nan


def missing() -> Kernel:
    raise ImportError("No module named 'flash_attn'")


def test_the_first_kernel_that_is_right_serves(caplog: pytest.LogCaptureFixture) -> None:
    """Not one that is missing, fails, sees other tokens, or gives no numbers; the log says why."""
    differs = partial(varlen.difference, torch.device("cpu"), torch.float32, SHAPE, packing._loop)
    wrong = [
        missing,
        *(kernel(f.__name__, f) for f in (broken, too_wide, nothing)),
    ]
    with caplog.at_level("INFO"):
        found = varlen.first_that_works([*wrong, kernel("right", right)], differs)
    assert found is not None
    assert found.name == "right"
    assert found.in_contexts
    for said in (
        "No module named 'flash_attn'",
        "no kernel image",
        "too_wide is off by",
        "nothing",
    ):
        assert said in caplog.text
    assert "for this device" not in caplog.text
    assert varlen.first_that_works(wrong, differs) is None
    for contexts in (varlen._NO_CONTEXTS, varlen._TRIED_CONTEXTS):
        assert differs(right, contexts) < 1e-5


def top_left(*inputs: Any, scale: float | None, window: int | None) -> Tensor:
    """Takes queries for those of the first keys."""
    q, k, v, starts, key_starts, longest, _ = inputs
    counts, keys = starts.diff().tolist(), key_starts[:-1].tolist()
    first = torch.cat([torch.arange(at, at + n) for at, n in zip(keys, counts, strict=True)])
    return right(
        q, k[first], v[first], starts, starts, longest, longest, scale=scale, window=window
    )


def test_a_kernel_that_knows_no_contexts_serves_where_there_are_none() -> None:
    """The loop computes what several data begin with."""
    differs = partial(varlen.difference, torch.device("cpu"), torch.float32, SHAPE, packing._loop)
    found = varlen.first_that_works([kernel("top_left", top_left)], differs)
    assert found is not None
    assert not found.in_contexts


def test_a_processor_and_float32_have_none() -> None:
    """They are not even tried."""
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        assert varlen.choose(torch.device(device), dtype, SHAPE, broken) is None


def test_float32_on_a_gpu_is_warned_of() -> None:
    """With what to do; nothing else is."""
    assert "set trainer.dtype" in varlen.slow_dtype(torch.device("cuda"), "float32")
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        assert varlen.slow_dtype(torch.device(device), dtype) == ""


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: causal, with the window before a token."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        *inputs: Any, softmax_scale: Any, causal: bool, deterministic: bool, window_size: Any
    ):
        assert not deterministic
        q, k, v, starts, key_starts, longest, key_longest = inputs
        assert (starts is key_starts) == (longest == key_longest)
        assert causal
        scale = softmax_scale or q.shape[-1] ** -0.5
        return attend(q, k, v, starts, key_starts, scale, window_size[0])

    installed = ModuleType("flash_attn")
    installed.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", installed)
    loop = packing._loop
    differs = partial(varlen.difference, torch.device("cpu"), torch.float32, SHAPE, loop)
    found = varlen.first_that_works([varlen.flash_kernel], differs)
    assert found is not None
    assert found.name == "flash-attn"


def test_starts_are_made_once_for_all_layers() -> None:
    """Equal lengths share them."""
    device = torch.device("cpu")
    assert varlen.sequence_starts((2, 1, 3), device).tolist() == [0, 2, 3, 6]
    assert varlen.sequence_starts((2, 1), device) is varlen.sequence_starts((2, 1), device)
