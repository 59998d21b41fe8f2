"""What tunings say of themselves is all that files, records and engines ask."""

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from checkpoints import to_files
from tinsmith.internal.v1 import trainer_link_service_pb2
from tinsmith.v1 import checkpoint_service_pb2, training_service_pb2
from tinsmithd import tunings
from tinsmithd.checkpoint.catalogue import record, schema
from tinsmithd.convert.types import tuning_from_pb, tuning_to_pb
from tinsmithd.domain import BaseModelInfo, FullConfig, LoraConfig, ModelState, Tuning
from tinsmithd.errors import DataLoss
from tinsmithd.modeling.weights import FUSED_WEIGHTS, WEIGHTS
from tinsmithd.state import checks as state_checks
from tinsmithd.state import files as state_files
from tinsmithd.trainer.engines.registry import Engines


@dataclass(frozen=True)
class Third(Tuning):
    """One that nobody has heard of: its checkpoints are folders for transformers."""

    kind: ClassVar[str] = "third"
    noun: ClassVar[str] = "a third of the weights"
    is_adapter: ClassVar[bool] = False

    layers: int = field(default=1, metadata={"low": 1, "high": 9})
    share: float = 0.5
    embeddings: bool = False


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Third:
    """Known from here on, by one entry."""
    monkeypatch.setitem(tunings.TUNINGS, "third", Third)  # type: ignore[arg-type]
    return Third(layers=3, embeddings=True)


def test_a_tuning_is_known_on_every_floor() -> None:
    """Each has weights for both engines, and a case wherever the contract has a tuning (ADR 23)."""
    kinds = set(tunings.TUNINGS.values())
    assert set(WEIGHTS) == set(FUSED_WEIGHTS) == kinds
    files = (checkpoint_service_pb2, training_service_pb2, trainer_link_service_pb2)
    messages = [m for file in files for m in file.DESCRIPTOR.message_types_by_name.values()]
    places = [m for m in messages if "tuning" in m.oneofs_by_name]
    assert len(places) > 4
    for place in places:
        cases = {field.name for field in place.oneofs_by_name["tuning"].fields}
        assert cases == {f"{kind}_config" for kind in tunings.TUNINGS}
    for kind in kinds:
        sent = training_service_pb2.Model(**tuning_to_pb(kind()))
        assert tuning_from_pb(sent, "", 64) == kind()


def state_of(tuning: Tuning) -> ModelState:
    weights = {"a.weight": np.ones((2, 3), np.float32)}
    return ModelState(tuning, weights, {}, 0, {"model_type": "llama"})


def test_a_third_tuning_is_written_and_read(third: Third) -> None:
    """As files of a state and as an entry of a record."""
    files = to_files(state_of(third))
    assert set(files) == {"model.safetensors", "config.json", "model_state.json"}
    assert state_files.from_files(files, third).tuning == third
    assert record.read(row(third.to_document())).tuning == third
    assert LoraConfig().mismatch(third) == (
        "the checkpoint holds a third of the weights, this model trains a LoRA adapter"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", 10, "third.layers: 10 is no whole number in 1..9"),
        ("layers", True, "third.layers: True is no whole number in 1..9"),
        ("share", 0, "third.share: 0 is no number above 0"),
        ("embeddings", 1, "third.embeddings: not true or false"),
        ("other", 1, "third: 'other' is not known"),
    ],
)
def test_its_settings_are_checked_by_their_fields(
    third: Third, name: str, value: object, message: str
) -> None:
    """Type, range, and that there are no others."""
    files = to_files(state_of(third))
    about = json.loads(files["model_state.json"])
    about["third"][name] = value
    files["model_state.json"] = json.dumps(about).encode()
    with pytest.raises(DataLoss, match=message):
        state_files.from_files(files, None)


def row(about_tuning: dict[str, Any]) -> sqlite3.Row:
    """A row of the catalogue."""
    values = {"base_model": "tiny", "step_count": 3, "create_time_s": 1.0, "user_metadata": {}}
    text = json.dumps({**about_tuning, **values, "files": []})
    columns = (7, "m", "sampler", "one", None, text)
    db = sqlite3.connect(":memory:")
    db.row_factory = sqlite3.Row
    query = (
        "SELECT ? AS number, ? AS model_id, ? AS kind, ? AS name, ? AS expire_time_s, ? AS record,"
        " ? AS digest"
    )
    found: sqlite3.Row = db.execute(query, (*columns, schema.digest_of(*columns))).fetchone()
    return found


@pytest.mark.parametrize("tuning", [LoraConfig(rank=3, alpha=6.0, seed=5), FullConfig()])
def test_records_name_their_tuning(tuning: Tuning) -> None:
    """Those of earlier versions too, in which `lora` is null where there is no adapter."""
    assert record.read(row(tuning.to_document())).tuning == tuning
    document = tuning.to_document()
    earlier = {"lora": document.get("lora")}
    assert record.read(row(earlier)).tuning == tuning


class Engine:
    """Notes what becomes of it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.info = BaseModelInfo("tiny", "", 1, 1, "", 1, 1)
        self.identity = {"engine": name}
        self._log, self._name = log, name
        log.append(f"load {name}")

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        self._log.append(f"create {model_id}")

    def delete_model(self, model_id: str) -> None:
        self._log.append(f"delete {model_id}")

    def close(self) -> None:
        self._log.append(f"close {self._name}")


def test_one_engine_is_loaded_at_a_time(third: Third) -> None:
    """Adapters keep theirs; what changes the base has it loaded again before and after."""
    log: list[str] = []
    makers: Any = {t: lambda t=t: Engine(log, t.kind) for t in (LoraConfig, Third)}
    engines = Engines(makers, LoraConfig)
    for model_id, tuning in (("a", LoraConfig()), ("b", LoraConfig())):
        engines.create_model(model_id, tuning)
    assert engines.of("a") is engines.of("b")
    with pytest.raises(ValueError, match="alone"):
        engines.create_model("c", third)
    for model_id in ("a", "b", "unknown"):
        engines.delete_model(model_id)
    for model_id in ("c", "d"):
        engines.create_model(model_id, third)
        with pytest.raises(ValueError, match="alone"):
            engines.create_model("e", third)
        engines.delete_model(model_id)
        with pytest.raises(KeyError):
            engines.of(model_id)
    engines.create_model("f", LoraConfig())
    assert engines.identity == {"engine": "lora"}
    assert log == [
        *("load lora", "create a", "create b", "delete a", "delete b"),
        *("close lora", "load third", "create c", "close third"),
        *("load third", "create d", "close third"),
        *("load lora", "create f"),
    ]


def test_a_new_model_shares_its_rank_out_among_experts() -> None:
    """Unless it says a rank of its own, or has nothing on experts, or there are none."""
    assert LoraConfig(rank=32).on_base(8) == LoraConfig(rank=32, expert_rank=4)
    assert LoraConfig(rank=9).on_base(2).expert_adapter_rank == 4
    assert LoraConfig(rank=4).on_base(8).expert_adapter_rank == 1
    assert LoraConfig(rank=32, expert_rank=32).on_base(8).expert_adapter_rank == 32
    for tuning, experts in (
        (LoraConfig(rank=32), 0),
        (LoraConfig(rank=32, train_mlp=False), 8),
        (FullConfig(), 8),
    ):
        assert tuning.on_base(experts) == tuning


def test_an_adapter_of_before_keeps_its_rank_on_experts() -> None:
    """Records and files without the setting mean the rank, and fit only models that have it."""
    document = LoraConfig(rank=8).to_document()
    del document["lora"]["expert_rank"]
    before = tunings.from_document(document)
    assert before.expert_adapter_rank == 8
    assert not before.mismatch(LoraConfig(rank=8, expert_rank=8))
    assert "expert adapter rank 8, this model 1" in LoraConfig(rank=8, expert_rank=1).mismatch(
        before
    )
    name = "base_model.model.mlp.experts.lora_{}.weight"  # of two experts
    weights = {name.format("A"): np.ones((16, 3), "f4"), name.format("B"): np.ones((3, 16), "f4")}
    config = {"peft_type": "LORA", **before.config_entries}
    files = to_files(ModelState(before, weights, {}, 0, config))
    about = json.loads(files[state_files.STATE_FILE])
    del about["lora"]["expert_rank"]
    files[state_files.STATE_FILE] = json.dumps(about).encode()
    assert state_files.from_files(files, before).tuning == before


@pytest.mark.parametrize("said", [None, {}, {"mlp.experts.gate_up_proj": 2}, 2, True])
def test_the_rank_of_experts_is_in_the_configuration(said: object) -> None:
    """PEFT computes by it, so it is what the tuning says, and nothing else."""
    lora = LoraConfig(rank=8, expert_rank=2)
    entries = {"peft_type": "LORA", **lora.config_entries}
    state_checks.check_peft_config("file", entries, lora)
    assert entries["rank_pattern"] == {
        "mlp.experts.gate_up_proj": 2,
        "mlp.experts.down_proj": 2,
    }
    with pytest.raises(state_checks.StateInvalid, match="rank_pattern"):
        state_checks.check_peft_config("file", {**entries, "rank_pattern": said}, lora)
    with pytest.raises(state_checks.StateInvalid, match="rank_pattern"):
        state_checks.check_peft_config("file", entries, LoraConfig(rank=8))


@pytest.mark.parametrize("name", ["r", "lora_alpha", "rank_pattern"])
def test_true_is_no_number_in_a_configuration(name: str) -> None:
    """To Python it is 1; to who reads the file it may be anything."""
    lora = LoraConfig(rank=2, alpha=1.0, expert_rank=1) if name != "r" else LoraConfig(rank=1)
    entries: dict[str, Any] = {"peft_type": "LORA", **lora.config_entries}
    state_checks.check_peft_config("file", entries, lora)
    value = entries[name]
    entries[name] = dict.fromkeys(value, True) if isinstance(value, dict) else True
    with pytest.raises(state_checks.StateInvalid, match=name):
        state_checks.check_peft_config("file", entries, lora)
