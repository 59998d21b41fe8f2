"""The adapters of rows in the form that the compiled part reads."""

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.lora_rows import LoraRows
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora
from tinsmithd.sampler.engines.transformers.native.abi import SITES, GroupOf, SiteOf

Groups = "ctypes.Array[GroupOf]"


class _Sites:
    """One adapter: its sites, and the memory that they point to."""

    def __init__(self, sites: Sequence[SiteLora | None]) -> None:
        self._kept: list[Tensor] = []
        self.array = (SiteOf * len(sites))()
        for place, site in enumerate(sites):
            if site is not None:
                self.array[place] = self._site(site)

    def _site(self, site: SiteLora) -> SiteOf:
        a, b = site.wide()
        self._kept += [a, b]
        made = SiteOf(a.data_ptr(), b.data_ptr(), len(site.d_outs), site.rank)
        made.widths[: len(site.d_outs)] = site.d_outs
        return made


class NativeLoras:
    """Adapters that were used, for as long as they are there. One thread uses it."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[LoraWeights, _Sites] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[LoraWeights, _Sites] = WeakKeyDictionary()
        self._groups: WeakKeyDictionary[LoraRows, list[_Grouped]] = WeakKeyDictionary()

    def groups(self, loras: LoraRows) -> "_Grouped":
        """What adapters add to the products of all layers."""
        return self._made(loras)[0]

    def head_groups(self, loras: LoraRows) -> "_Grouped":
        """What they add to logits."""
        return self._made(loras)[1]

    def _made(self, loras: LoraRows) -> "list[_Grouped]":
        if loras not in self._groups:
            self._groups[loras] = [_Grouped(), _Grouped()]
            for adapter, rows in loras.by_adapter():
                index = np.array(rows, np.int32)
                for grouped, sites in zip(self._groups[loras], self._sites(adapter), strict=True):
                    grouped.add(sites, index)
        return self._groups[loras]

    def _sites(self, adapter: LoraWeights) -> tuple[_Sites, _Sites]:
        if adapter not in self._layers:
            every = [site for layer in adapter.sites for site in layer]
            assert len(every) == SITES * len(adapter.sites)
            self._layers[adapter], self._heads[adapter] = _Sites(every), _Sites([adapter.head])
        return self._layers[adapter], self._heads[adapter]


class _Grouped:
    """Groups of rows, and the memory that they point to."""

    def __init__(self) -> None:
        self._kept: list[tuple[_Sites, np.ndarray]] = []
        self._array: ctypes.Array[GroupOf] | None = None

    def add(self, sites: _Sites, rows: np.ndarray) -> None:
        """One more adapter and its rows, int32."""
        self._kept.append((sites, rows))

    @property
    def array(self) -> "ctypes.Array[GroupOf]":
        """All groups."""
        if self._array is None:
            each = [GroupOf(sites.array, rows.ctypes.data, len(rows)) for sites, rows in self._kept]
            self._array = (GroupOf * len(each))(*each)
        return self._array
