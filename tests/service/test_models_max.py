"""What is said through the wire where models cannot be suspended."""

from pathlib import Path

import grpc
import pytest

from recorded_cluster import recorded_cluster
from tinsmith import v1 as pb
from tinsmithd.modeling.base import load_base
from tinsmithd.trainer.engines.reference import ReferenceEngine
from wire import reason_and_field


async def test_without_durability_the_error_at_the_limit_names_the_calls_to_make(
    tiny_model: Path,
) -> None:
    """And one of them makes room."""
    engine = ReferenceEngine(load_base(str(tiny_model), dtype="float32", on_progress=print))
    async with recorded_cluster(engine, 1000, models_max=2) as recorded:
        first, _ = await recorded.create(), await recorded.create()
        with pytest.raises(grpc.RpcError) as refusal:
            await recorded.create()
        assert reason_and_field(refusal.value)[0] == "TOO_MANY_MODELS"
        details = refusal.value.details()
        assert details is not None
        assert details.startswith("models_max is 2")
        for call in ("TrainingClient.delete()", "RestClient.delete_model(", "DeleteModel"):
            assert call in details
        await recorded.stub.DeleteModel(pb.DeleteModelRequest(model_id=first))
        await recorded.create()
