"""What the dashboard shows, from top to bottom."""

from collections.abc import Sequence

from monitoring import serving_panels as serving
from monitoring import training_panels as training
from monitoring.panel import Panel, Row

ROWS: Sequence[Row] = (
    *(training.OVERVIEW, training.OF_TRAINING, training.RANKS, training.DURABILITY),
    *(serving.SAMPLER, serving.CHECKPOINT, serving.GATEWAY),
    *(serving.CALLS, serving.TENANT, serving.PROCESSES),
)

__all__ = ["ROWS", "Panel", "Row"]
