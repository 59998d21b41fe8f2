"""What the process that has the journal knows of the tables without asking them."""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unanswered:
    """A call that has no answer, in the columns of its row."""

    seq_id: int
    digest: bytes
    payload_bytes: int
    attempts: int = 0


class Known:
    """True as long as this process alone writes to the tables, which each transaction checks first
    (the epoch), and as long as no transaction fails: then it has to be made anew.

    Args:
        db: The tables.

    Attributes:
        models: Ids of those that there are.
        parked: Numbers of the calls that wait for those before theirs, by model.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.models = {model_id for (model_id,) in db.execute("SELECT model_id FROM models")}
        self.parked: defaultdict[str, set[int]] = defaultdict(set)
        for model_id, seq_id in db.execute("SELECT model_id, seq_id FROM parked"):
            self.parked[model_id].add(seq_id)
        self._unanswered: defaultdict[str, dict[int, Unanswered]] = defaultdict(dict)
        # How many steps are remembered of a model, and the newest one's position.
        self._steps: dict[str, tuple[int, int]] = {}

    def gone(self, model_id: str) -> None:
        """A model is gone, with everything of it."""
        self.models.discard(model_id)
        for by_model in (self.parked, self._unanswered, self._steps):
            by_model.pop(model_id, None)

    # --- calls without an answer --------------------------------------------------------------

    def wrote(self, model_id: str, position: int, call: Unanswered) -> None:
        """A call was written."""
        self._unanswered[model_id][position] = call

    def answered(self, model_id: str, position: int) -> Unanswered | None:
        """Take a call that is answered now; None where there is none."""
        calls = self._unanswered.get(model_id)
        found = None if calls is None else calls.pop(position, None)
        if calls is not None and not calls:
            del self._unanswered[model_id]
        if found is None:  # of before this process began, or changed since it was written
            row = self._db.execute(
                "SELECT seq_id, digest, payload_bytes, attempts FROM calls "
                "WHERE model_id=? AND position=?",
                (model_id, position),
            ).fetchone()
            found = None if row is None else Unanswered(*row)
        return found

    def changed(self, model_id: str, positions: Iterable[int]) -> None:
        """The rows of some calls are others now, or gone."""
        if (calls := self._unanswered.get(model_id)) is not None:
            for position in positions:
                calls.pop(position, None)

    def changed_until(self, model_id: str, end: int) -> None:
        """So are those of all calls up to a position."""
        calls = self._unanswered.get(model_id, {})
        self.changed(model_id, [position for position in calls if position <= end])

    # --- steps --------------------------------------------------------------------------------

    def steps_of(self, model_id: str) -> tuple[int, int]:
        """How many steps are remembered of a model, and the newest one's position."""
        found = self._steps.get(model_id)
        if found is None:
            query = "SELECT count(*), coalesce(max(position), 0) FROM steps WHERE model_id=?"
            count, newest = self._db.execute(query, (model_id,)).fetchone()
            found = self._steps[model_id] = (count, newest)
        return found

    def has_steps(self, model_id: str, count: int, newest: int) -> None:
        """So many are remembered now."""
        self._steps[model_id] = (count, newest)
