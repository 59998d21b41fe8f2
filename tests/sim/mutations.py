"""Bugs put in on purpose, to see that the simulator finds them.

A mutation replaces some text in the source of one production function for the length of a run.
Where that text is not there any more it says so, and has to be written anew.
"""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sim.disk import SimStore
from sim.world import Result, simulate
from tinsmithd.training.journal import Journal
from tinsmithd.training.lane import Lane
from tinsmithd.training.lane.admission import Admission
from tinsmithd.training.lane.answer_recorder import AnswerRecorder
from tinsmithd.training.models import snapshot_store
from tinsmithd.training.models.changes import Changes
from tinsmithd.training.models.deletion import Deletion
from tinsmithd.training.models.execution import ModelExecutor
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.recovery import Recovery


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        owner: The class or module that has the function.
        name: The function.
        old, new: Text in its source, and what it becomes.
    """

    owner: Any
    name: str
    old: str
    new: str


_ANSWER_EARLY = """
            self._commits = getattr(self, "_commits", 0) + 1
            if self._commits % 3 == 0:
                for early in group:
                    if not early.done.done():
                        early.done.set_result(None)
"""

MUTATIONS = {
    "durable-too-early": Mutation(
        Journal,
        "_write",
        'failpoints.hit("wal_append")',
        'failpoints.hit("wal_append")' + _ANSWER_EARLY,
    ),
    "snapshot-unverified": Mutation(
        snapshot_store, "_verified", 'if digest.hexdigest() != about["sha256"]:', "if False:"
    ),
    "replay-unchecked": Mutation(
        Recovery,
        "_replay",
        "answer_digest(answer) == call.answer_digest",
        "True",
    ),
    "no-fence": Mutation(SimStore, "_check_epoch", "if self._disk.epoch != self._epoch:", "if 0:"),
    "composition-ignored": Mutation(
        Changes,
        "_compute",
        'given = composition.batches[index] if composition else b""',
        'given = b""',
    ),
    "answer-before-record": Mutation(
        AnswerRecorder,
        "settle",
        "self.recording += 1",
        "self.recording += 1\n    queued.answer.fail(answer.error) if answer.error else "
        "queued.answer.finish(answer.value)",
    ),
    "attempts-uncounted": Mutation(
        Lane, "_again", "queued.attempts += blamed", "queued.attempts += 0"
    ),
    "everyone-blamed": Mutation(
        Lane, "_again", "queued.attempts += blamed", "queued.attempts += 1"
    ),
    "stale-ranks": Mutation(Lane, "_apply", "if self._presence.absent:", "if False:"),
    "refused-kept": Mutation(
        Lane,
        "_is_written",
        "if begun and changes_model(queued.call.work):",
        "if False:",
    ),
    "answer-unwritten": Mutation(
        Lane, "_apply", "if not await self._is_written(queued, begun=True):", "if False:"
    ),
    "save-before-record": Mutation(ModelExecutor, "_save", "await self._journal.flush()", "pass"),
    "trim-too-much": Mutation(
        ModelSnapshots,
        "add",
        "Trim(self._model_id, old.position)",
        "Trim(self._model_id, position)",
    ),
    "load-beside-snapshot": Mutation(ModelExecutor, "_load", "await self._taker.quiet()", "pass"),
    "suspended-too-late": Mutation(
        ModelExecutor, "suspend", "self._changes.stepped_at", "self._changes.stepped_at + 1"
    ),
    "deleted-forgotten": Mutation(
        Deletion, "delete", "remember = bool(model.request_id)", "remember = False"
    ),
    "id-given-twice": Mutation(Deletion, "delete", "keep_id=model.chose_id", "keep_id=False"),
    "parked-forgotten": Mutation(Admission, "recall", "for waited in parked:", "for waited in ():"),
    "parked-not-taken-out": Mutation(
        Admission, "_end_gap_wait", "if not queued.call.acknowledge:", "if True:"
    ),
    "orphans-kept": Mutation(
        Admission, "recall", "elif call.seq_id not in (0, self.next_seq_id):", "elif False:"
    ),
}


@contextlib.contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Have a mutation in place for the body of the `with`."""
    if name is None:
        yield
        return
    mutation = MUTATIONS[name]
    good = inspect.getattr_static(mutation.owner, mutation.name)
    source = textwrap.dedent(inspect.getsource(good))
    if mutation.old not in source:
        raise LookupError(f"{name}: {mutation.name} has no {mutation.old!r}")
    space = dict(vars(sys.modules[good.__module__]))
    exec(compile(source.replace(mutation.old, mutation.new), f"<{name}>", "exec"), space)
    setattr(mutation.owner, mutation.name, space[mutation.name])
    try:
        yield
    finally:
        setattr(mutation.owner, mutation.name, good)


def find(name: str, seeds: Iterable[int]) -> Result | None:
    """The first run that shows a mutation, or None."""
    with applied(name):
        for seed in seeds:
            result = simulate(seed)
            if result.failures:
                return result
    return None
