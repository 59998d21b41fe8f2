"""The weights of one adapter, in the form that a decoder adds them in.

Ranks are padded with zeros to a power of two, so that adapters of many ranks meet few kernels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.sampler.engines.transformers.model.experts import ExpertLora
from tinsmithd.sampler.engines.transformers.model.lora_layout import (
    ExpertPart,
    LayerLayout,
    LoraLayout,
    Part,
    WantedPlaces,
    expert_factors,
    names,
)
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora, columns_of

RANK_MIN, EXPERT_RANK_MIN = 16, 4
"""Smaller ranks are padded to them; those on experts are small, and many. A padded rank is a
multiple of a cache line, and so every site begins with one."""


class Turning(NamedTuple):
    """A matrix that is to be turned round: `to = scale * given.T`.

    Attributes:
        given: float32 `(rows, columns)`, contiguous.
        to: float32 `(columns, rows)`, of which each row is contiguous.
    """

    given: np.ndarray
    to: np.ndarray
    scale: float


Memory = Callable[[int], np.ndarray]
"""Gives so many zeros, float32, that begin with a cache line."""
Turn = Callable[[Sequence[Turning]], None]


def turned(matrices: Sequence[Turning]) -> None:
    """Turn matrices round, with numpy."""
    for given, to, scale in matrices:
        np.multiply(given.T, np.float32(scale), out=to)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """One adapter.

    Attributes:
        rank: Padded; that on experts apart.
        scaling: alpha / rank as they were; that on experts apart.
        sites: Per layer and site; None where the adapter stands on none of its parts.
        experts: Per layer; None where it has no experts, or the adapter leaves them alone.
        head: Of the head, float32; None where it has no adapter.
        bytes: That all of it takes.
    """

    rank: int
    scaling: float
    sites: Sequence[Sequence[SiteLora | None]]
    experts: Sequence[ExpertLora | None]
    head: SiteLora | None
    bytes: int

    @cached_property
    def can_stand_beside(self) -> bool:
        """See `SiteLora`; of all sites."""
        return all(site.can_stand_beside for layer in self.sites for site in layer if site)

    def reorder_some(self) -> bool:
        """Reorder the sites of the next layer, see `SiteLora.reorder`; False once all are."""
        for layer in self.sites:
            slow = [site for site in layer if site is not None and site.is_slow]
            if slow:
                for site in slow:
                    site.reorder()
                return True
        return False


def lora_weights(
    layout: LoraLayout,
    state: ModelState,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    turn: Turn = turned,
    rounded: bool = False,
) -> LoraWeights:
    """Bring an adapter into a decoder's form.

    Args:
        layout: Where adapters can stand.
        state: The adapter.
        dtype: Of what is added below the head: that of the base.
        device: Where it goes.
        memory: Gives that of float32 sites.
        turn: Turns matrices round.
        rounded: What is added below the head has the values of bfloat16, before s; dtype is
            float32.

    Raises:
        FailedPrecondition: It does not fit the base model (INCOMPATIBLE_CHECKPOINT).
    """
    places = layout.wanted(state)
    assert isinstance(state.tuning, LoraConfig)
    maker = _Maker(places, state.tuning, state.weights, device)
    wide = [site for layer in layout.layers for site in layer.sites]
    wide = [*(wide if dtype == torch.float32 else ()), (layout.head,)]
    made = maker.wide_sites(wide, memory, turn, rounded=rounded)
    sites = [
        [made.get(parts) or maker.narrow_site(parts, dtype) for parts in layer.sites]
        for layer in layout.layers
    ]
    experts = [maker.experts(layer, dtype) for layer in layout.layers]
    head = made.get((layout.head,))
    found = [site for layer in sites for site in layer] + [head]
    size = sum(site.bytes for site in found if site) + sum(e.bytes for e in experts if e)
    return LoraWeights(maker.rank, maker.scaling, sites, experts, head, size)


class _Maker:
    """Makes the tensors of one adapter.

    Args:
        places: Where it stands.
        lora: Its configuration.
        weights: Its weights by PEFT's names.
        device: Where they go.
    """

    def __init__(
        self,
        places: WantedPlaces,
        lora: LoraConfig,
        weights: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        self._places, self._weights, self._device = places, weights, device
        self._lora, self._own_rank = lora, lora.rank
        self.scaling = lora.alpha / lora.rank
        self.rank = _padded(lora.rank, RANK_MIN)

    def wide_sites(
        self, sites: Iterable[tuple[Part, ...]], memory: Memory, turn: Turn, *, rounded: bool
    ) -> dict[tuple[Part, ...], SiteLora]:
        """In float32: those products of parts side by side that have an adapter."""
        wanted = [parts for parts in sites if any(map(self._places.has, parts))]
        rows = [(len(parts) * self.rank, parts[0].d_in, _d_out(parts)) for parts in wanted]
        # At once, which is a tenth of the page faults.
        room = memory(sum(count * (d_in + d_out) for count, d_in, d_out in rows))
        turnings: list[Turning] = []
        turned_sites: list[tuple[np.ndarray, np.ndarray]] = []
        for parts, (count, d_in, d_out) in zip(wanted, rows, strict=True):
            own, room = room[: count * (d_in + d_out)], room[count * (d_in + d_out) :]
            a, b = own[: d_in * count].reshape(d_in, count), own[d_in * count :]
            b = b.reshape(count, d_out)
            own_rounded = rounded and parts != (self._places.layout.head,)
            self._turn_parts(parts, a, b, turnings, rounded=own_rounded)
            turned_sites.append((a, b))
        turn(turnings)
        made = {}
        for parts, (a, b) in zip(wanted, turned_sites, strict=True):
            a_there, b_there = (torch.from_numpy(each).to(self._device) for each in (a, b))
            d_outs = [part.d_out for part in parts]
            made[parts] = SiteLora.turned(a_there, b_there, d_outs, self.rank)
        return made

    def _turn_parts(
        self,
        parts: Sequence[Part],
        a: np.ndarray,
        b: np.ndarray,
        turnings: list[Turning],
        *,
        rounded: bool,
    ) -> None:
        """Have the matrices of parts come to a site's `(d_in, count)` and `(count, d_out)`.

        They get s as well: nothing is touched again, nor by threads that others want meanwhile;
        see `SiteLora`.
        """
        place = 0
        for number, part in enumerate(parts):
            if self._places.has(part):
                own = slice(number * self.rank, number * self.rank + self._own_rank)
                given_a, given_b = (_floats(self._weights[name]) for name in names(part.name))
                if rounded:
                    given_a, given_b = _rounded(given_a), _rounded(given_b)
                turnings.append(Turning(given_a, a[:, own], 1.0))
                turnings.append(Turning(given_b, b[own, place : place + part.d_out], self.scaling))
            place += part.d_out

    def narrow_site(self, parts: Sequence[Part], dtype: torch.dtype) -> SiteLora | None:
        """Of a product of parts side by side, in another dtype than float32."""
        if dtype == torch.float32 or not any(map(self._places.has, parts)):
            return None
        count, d_in = len(parts) * self.rank, parts[0].d_in
        columns, rows = columns_of(count) if dtype == torch.bfloat16 else (count, count)
        a, b = np.zeros((rows, d_in), np.float32), np.zeros((_d_out(parts), columns), np.float32)
        place = 0
        for number, part in enumerate(parts):
            if self._places.has(part):
                name_a, name_b = names(part.name)
                own = slice(number * self.rank, number * self.rank + self._own_rank)
                a[own] = self._weights[name_a]
                b[place : place + part.d_out, own] = self._weights[name_b]
            place += part.d_out
        a_there, b_there = (torch.from_numpy(made).to(self._device, dtype) for made in (a, b))
        d_outs = [part.d_out for part in parts]
        return SiteLora(a_there, b_there, d_outs, self.rank, self.scaling)

    def experts(self, layer: LayerLayout, dtype: torch.dtype) -> ExpertLora | None:
        """Of the experts of a layer."""
        if not layer.experts or not self._places.has_experts:
            return None
        gate_up, down = (self._expert(part, dtype) for part in layer.experts)
        return ExpertLora(*gate_up, *down, self._lora.alpha / self._lora.expert_adapter_rank)

    def _expert(self, part: ExpertPart, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = self._lora.expert_adapter_rank
        a, b = expert_factors(part, own, self._weights)
        rank = _padded(own, EXPERT_RANK_MIN)
        all_a = self._zeros((part.experts, part.d_in, rank), dtype)
        all_b = self._zeros((part.experts, rank, part.d_out), dtype)
        all_a[:, :, :own] = self._tensor(a).transpose(1, 2)
        all_b[:, :own] = self._tensor(b).transpose(1, 2)
        return all_a, all_b

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        floats = np.asarray(array, np.float32)
        # torch warns of memory that it may not write to.
        own = floats if floats.flags.writeable else floats.copy()
        return torch.from_numpy(own).to(self._device)


def _d_out(parts: Sequence[Part]) -> int:
    return sum(part.d_out for part in parts)


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _rounded(array: np.ndarray) -> np.ndarray:
    """float32 of the nearest bfloat16, of equals the even one."""
    own = array if array.flags.writeable else array.copy()
    rounded: np.ndarray = torch.from_numpy(own).bfloat16().float().numpy()
    return rounded


def _padded(rank: int, least: int) -> int:
    return max(least, 1 << (rank - 1).bit_length())
