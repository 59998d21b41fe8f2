"""Takes up the calls of a model where an earlier process left them."""

import logging
from collections.abc import Callable

from tinsmithd.training.call.work import Outcome, Work
from tinsmithd.training.journal.journal import Journal
from tinsmithd.training.journal.records import Fenced, StoreDamaged, StoredModel
from tinsmithd.training.lane.interface import model_lost, shutting_down
from tinsmithd.training.models.model import Model

_log = logging.getLogger(__name__)


async def recall_calls(journal: Journal, model: Model, found: StoredModel) -> None:
    """Give a model's lane what the journal has of its calls."""
    works: dict[int, Work] = {}
    try:
        for call in found.calls:
            if call.result_digest is None and not found.lost:
                works[call.position] = await journal.work(model.model_id, call.position)
    except StoreDamaged as error:
        _log.error("model %s is lost: %s", model.model_id, error)
        # Its answers stay: what was acknowledged can be asked for again.
        model.lane.close(model_lost(model.model_id, str(error)))

    def read(position: int) -> Callable[[], object]:
        async def outcome() -> Outcome:
            try:
                return await journal.outcome(model.model_id, position)
            except Fenced as error:
                raise shutting_down() from error

        return outcome

    model.lane.recall(found.calls, works, read)
