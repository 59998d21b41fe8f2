"""Numbers of calls (`seq_id`), and what a restored back-up makes of them.

A model's numbers are consecutive. A cluster that was restored from a back-up knows less than its
clients may: a call that it never saw could be answered before, and the next one of such a client
would fit behind what another client sends. So a restored journal begins a new *incarnation*, whose
numbers lie above all of the earlier ones. Whoever goes on with a number of an earlier incarnation
has its first answer where the back-up has it, and else hears that the model was restored.
"""

INCARNATION_BITS = 20
"""Incarnations count seconds, and no model makes a million calls in one: so none ever reaches the
numbers of a later one. They stay below 2^53, which every program's JSON can write."""


def last_before(incarnation: int) -> int:
    """The number before the first one of an incarnation; 0 for a journal that was not restored."""
    return incarnation << INCARNATION_BITS
