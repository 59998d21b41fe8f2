"""Adds the adapters of the rows of one forward, of which each may have its own or none.

What an adapter adds to a row is the same sum of the same products whichever adapters other rows
have: the rows of an adapter are brought together, and products are those of `RowRule`. Adapters
with few rows each are computed side by side, by one product over a stack of their weights, of which
each row keeps what its own adapter made.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.experts import ExpertRuns
from tinsmithd.sampler.engines.transformers.model.linear import RowRule
from tinsmithd.sampler.engines.transformers.model.lora_layout import Site
from tinsmithd.sampler.engines.transformers.model.lora_stack import (
    LoraStack,
    LoraStacks,
    StackKey,
)
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora

STACKED_ROWS_MAX = 16
"""Maximum rows of an adapter that is computed side by side with others."""

WHOLE_SHARE = 4
"""Rows of which at least one in so many has an adapter of a stack are not gathered for it."""


Add = Callable[..., Tensor]
"""`SiteLora.added` of some kind of rows."""


class _Run(Protocol):
    """Some rows and their adapters."""

    def added(self, layer: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """See `LoraRows.added`."""


class _Place(Protocol):
    """Where the rows of one adapter stand."""

    def added(self, lora: SiteLora, x: Tensor, y: Tensor) -> Tensor:
        """Add what an adapter makes of its rows of `(T, d_in)` to those of `(T, d_out)`."""


class _Group(NamedTuple):
    """Rows of one adapter that are all of prompts, or all of sequences."""

    adapter: LoraWeights
    of_prompts: bool
    rows: list[int]


class LoraRows:
    """The adapters of rows.

    Args:
        adapters: Per row; None where it has none. One row at least has one.
        sequences: How many rows, the first, are next tokens of sequences, not of prompts.
        stacks: Of adapters that are computed side by side.
        rule: How many rows products have.
        device: Where the rows are.
    """

    def __init__(
        self,
        adapters: Sequence[LoraWeights | None],
        sequences: int,
        stacks: LoraStacks,
        rule: RowRule,
        device: torch.device,
    ) -> None:
        self._adapters, self._stacks = tuple(adapters), stacks
        self._sequences = sequences if rule.many else len(self._adapters)
        self._rule, self._device = rule, device
        self._runs: list[_Run] | None = None
        self._masks: dict[tuple[int, bool], Tensor] = {}
        self._groups: dict[tuple[int, bool], _Group] = {}
        for row, adapter in enumerate(self._adapters):
            if adapter is not None:
                of_prompts = row >= self._sequences
                group = _Group(adapter, of_prompts, [])
                self._groups.setdefault((id(adapter), of_prompts), group).rows.append(row)

    def __len__(self) -> int:
        return len(self._adapters)

    def by_adapter(self) -> list[tuple[LoraWeights, list[int]]]:
        """The rows of each adapter, ascending."""
        found: dict[LoraWeights, list[int]] = {}
        for adapter, _of_prompts, rows in self._groups.values():
            found.setdefault(adapter, []).extend(rows)
        return [(adapter, sorted(rows)) for adapter, rows in found.items()]

    def select(self, rows: Sequence[int]) -> "LoraRows | None":
        """The adapters of some of the rows, in this order, those of sequences first.

        None where they have none.
        """
        chosen = [self._adapters[row] for row in rows]
        if not any(chosen):
            return None
        sequences = sum(row < self._sequences for row in rows)
        return LoraRows(chosen, sequences, self._stacks, self._rule, self._device)

    def added(self, layer: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Add to a product what its adapters make of its rows.

        Args:
            layer: Number of the layer.
            site: The product.
            x: What it is made of, `(T, d_in)`; the first of the T rows are ours.
            y: The product, `(T, d_out)`; it may be changed.

        Returns:
            The sum, which may be y.
        """
        if self._runs is None:
            self._runs = self._made_runs()
        for run in self._runs:
            y = run.added(layer, site, x, y)
        return y

    def experts(self, layer: int) -> ExpertRuns:
        """What is added to the experts of a layer; see `Experts`."""
        found = []
        for key, (adapter, _of_prompts, rows) in self._groups.items():
            lora = adapter.experts[layer]
            if lora is not None:
                if key not in self._masks:
                    mask = torch.zeros(len(self), dtype=torch.bool)
                    mask[rows] = True
                    self._masks[key] = mask.to(self._device)
                found.append((self._masks[key], lora))
        return found

    def added_to_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Add what the adapters of the head make of the rows.

        Args:
            hidden: `(N, d)`; the first of the N rows are ours.
            logits: float32 `(N, V)`; it may be changed.

        Returns:
            The sum, which may be `logits`.
        """
        hidden = hidden.float()
        for group in self._groups.values():
            if group.adapter.head is not None:
                logits = self._place(group).added(group.adapter.head, hidden, logits)
        return logits

    def _made_runs(self) -> list[_Run]:
        found: list[_Run] = []
        small: dict[StackKey, list[_Group]] = {}
        for group in self._groups.values():
            if self._is_small(group):
                key = group.adapter.rank, group.adapter.scaling
                small.setdefault(key, []).append(group)
            else:
                found.append(_Alone(group.adapter, self._place(group)))
        for groups in small.values():
            if len(groups) == 1:
                found.append(_Alone(groups[0].adapter, self._place(groups[0])))
                continue
            rows_of = {id(adapter): rows for adapter, _, rows in groups}
            for stack in self._stacks.of([group.adapter for group in groups]):
                beside = _SideBySide(stack, rows_of, self._sequences, self._rule, self._device)
                found.append(beside)
        return found

    def _is_small(self, group: _Group) -> bool:
        """Whether rows are few enough to be computed beside others, and may be."""
        adapter, of_prompts, rows = group
        if of_prompts or len(rows) > STACKED_ROWS_MAX or len(rows) == len(self):
            return False
        return adapter.can_stand_beside and adapter.rank in self._rule.beside

    def _place(self, group: _Group) -> "_Place":
        """How rows are brought together."""
        _adapter, of_prompts, rows = group
        add = functools.partial(SiteLora.added, rule=self._rule, of_prompts=of_prompts)
        if len(rows) == len(self):
            return _Everywhere(add)
        if rows[-1] - rows[0] + 1 == len(rows):
            return _Slice(add, rows[0], rows[-1] + 1)
        missing = self._rule.padded(len(rows)) - len(rows)
        index = torch.tensor(rows + rows[-1:] * missing, device=self._device)
        return _Gathered(add, index)


class _Everywhere:
    """All rows have the adapter."""

    def __init__(self, add: Add) -> None:
        self._add = add

    def added(self, lora: SiteLora, x: Tensor, y: Tensor) -> Tensor:
        """See `_Place`."""
        return self._add(lora, y=y, x=x)


class _Slice:
    """Rows that stand one after the other have the adapter."""

    def __init__(self, add: Add, start: int, end: int) -> None:
        self._add, self._rows = add, slice(start, end)

    def added(self, lora: SiteLora, x: Tensor, y: Tensor) -> Tensor:
        """See `_Place`."""
        y[self._rows] = self._add(lora, y=y[self._rows], x=x[self._rows])
        return y


class _Gathered:
    """Rows here and there have the adapter.

    Args:
        add: As in `_Everywhere`.
        index: The rows, int64, the last again until there are as many as a product has.
    """

    def __init__(self, add: Add, index: Tensor) -> None:
        self._add, self._index = add, index

    def added(self, lora: SiteLora, x: Tensor, y: Tensor) -> Tensor:
        """See `_Place`."""
        own, own_x = (rows.index_select(0, self._index) for rows in (y, x))
        # A row that stands there twice has the same bits twice.
        return y.index_copy_(0, self._index, self._add(lora, y=own, x=own_x))


class _Alone:
    """One adapter and its rows."""

    def __init__(self, adapter: LoraWeights, place: _Place) -> None:
        self._sites, self._place = adapter.sites, place

    def added(self, layer: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """See `LoraRows.added`."""
        lora = self._sites[layer][site]
        return y if lora is None else self._place.added(lora, x, y)


class _SideBySide:
    """Several adapters of one rank with few rows each.

    Args:
        stack: Their weights.
        rows_of: The rows of adapters, by `id`; others have none here.
        sequences: Number of rows, others included, which are the first of the forward.
        rule: How many rows products have.
        device: Where the rows are.
    """

    def __init__(
        self,
        stack: LoraStack,
        rows_of: Mapping[int, list[int]],
        sequences: int,
        rule: RowRule,
        device: torch.device,
    ) -> None:
        self._stack, self._rule = stack, rule
        places = {
            row: place
            for place, adapter in enumerate(stack.adapters)
            for row in rows_of.get(id(adapter), ())
        }
        rows = list(range(rule.padded(sequences)))
        self._index: Tensor | None = None
        if rule.padded(len(places)) * WHOLE_SHARE < len(rows):
            rows = sorted(places)
            rows += rows[-1:] * (rule.padded(len(rows)) - len(rows))
            self._index = torch.tensor(rows, device=device)
        # To rows without an adapter here zeros are added.
        others = torch.ones((len(rows), 1, len(stack.adapters), 1), dtype=torch.bool)
        for at, row in enumerate(rows):
            if row in places:
                others[at, 0, places[row]] = False
        self._others = others.to(device)

    def added(self, layer: int, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """See `LoraRows.added`."""
        lora = self._stack.site(layer, site)
        if lora is None:
            return y
        if self._index is None:
            count = len(self._others)
            total = lora.added(self._rule, y[:count], x[:count], self._others)
            if count == len(y):
                return total
            y[:count] = total
            return y
        own, own_x = (rows.index_select(0, self._index) for rows in (y, x))
        return y.index_copy_(0, self._index, lora.added(self._rule, own, own_x, self._others))
