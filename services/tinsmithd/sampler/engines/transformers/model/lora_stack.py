"""The weights of several adapters of one rank side by side, so that one product takes them all."""

from collections import OrderedDict
from collections.abc import Sequence

from tinsmithd.sampler.engines.transformers.model.lora_layout import Site
from tinsmithd.sampler.engines.transformers.model.lora_weights import LoraWeights
from tinsmithd.sampler.engines.transformers.model.site_lora import SiteLora

StackKey = tuple[int, float]
"""What the adapters of a stack have in common: their padded rank, and their scaling."""

STACKS_MAX = 4
"""Maximum stacks that are kept."""

STACK_ADAPTERS_MAX = 16
"""Maximum adapters of a stack: each row is multiplied by the weights of all of them."""


class LoraStack:
    """Copies of the weights of adapters of one rank and scaling.

    They are made when they are first used, which takes about as long as a forward.

    Args:
        adapters: Which.
    """

    def __init__(self, adapters: Sequence[LoraWeights]) -> None:
        self.adapters = list(adapters)
        self._sites: dict[tuple[int, Site], SiteLora | None] = {}

    def site(self, layer: int, site: Site) -> SiteLora | None:
        """The weights of all for one product; None where none has any."""
        key = layer, site
        if key not in self._sites:
            self._sites[key] = SiteLora.beside([each.sites[layer][site] for each in self.adapters])
        return self._sites[key]


class LoraStacks:
    """The stacks that were used last. Only the thread that computes uses them."""

    def __init__(self) -> None:
        self._stacks: OrderedDict[int, LoraStack] = OrderedDict()
        """By their `id`, that which was used last at the end."""

    def of(self, adapters: Sequence[LoraWeights]) -> list[LoraStack]:
        """Stacks that hold all of some adapters.

        A stack may hold adapters that are not asked for, but no more than those that are.

        Args:
            adapters: All different, of one rank and scaling.
        """
        left = {id(adapter): adapter for adapter in adapters}
        found: list[LoraStack] = []
        for stack in list(self._stacks.values()):
            here = [id(adapter) for adapter in stack.adapters if id(adapter) in left]
            if here and 2 * len(here) >= len(stack.adapters):
                found.append(stack)
                for key in here:
                    del left[key]
        if left:
            # Those that have room take in who is left, rather than one stack more.
            for stack in [one for one in found if len(one.adapters) < STACK_ADAPTERS_MAX]:
                found.remove(stack)
                wanted = set(map(id, adapters))
                left |= {id(one): one for one in stack.adapters if id(one) in wanted}
            alone = list(left.values())
            for start in range(0, len(alone), STACK_ADAPTERS_MAX):
                found.append(LoraStack(alone[start : start + STACK_ADAPTERS_MAX]))
        for stack in found:
            self._stacks[id(stack)] = stack
            self._stacks.move_to_end(id(stack))
        while len(self._stacks) > max(STACKS_MAX, len(found)):
            self._stacks.popitem(last=False)
        return found
