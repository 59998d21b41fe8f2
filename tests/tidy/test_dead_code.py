"""Nothing is in the servers that only a test uses."""

from collections.abc import Sequence
from pathlib import Path

from vulture import Vulture

from tidy.house import GENERATED, ROOT
from tinsmith.internal.v1 import trainer_link_service_pb2
from tinsmith.v1 import checkpoint_service_pb2, sampler_service_pb2, training_service_pb2

KINDS = ("function", "class", "method", "property")
CALLED_BY_LIBRARIES = {
    "intercept_service",
    "settings_customise_sources",
    "_load_env_vars",
    "_convert_to_zero_parameters",
    "add_lora_logits",  # these of vLLM
    "log_engine_initialized",
    "record",
    *("capture_signals", "data_received"),  # of uvicorn
    "handle_error",  # these of http.server
    "log_message",
    "formatException",  # of logging
}
"""Names of methods that a library calls, besides RPCs."""
CALLED_BY_DECORATORS = ["@model_validator", "@field_validator"]


def unused(folders: Sequence[Path]) -> list[str]:
    """Functions, classes and methods below `tinsmithd` that nothing here uses."""
    protos = (
        checkpoint_service_pb2,
        sampler_service_pb2,
        training_service_pb2,
        trainer_link_service_pb2,
    )
    rpcs = {
        method.name
        for proto in protos
        for service in proto.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    names = sorted(rpcs | CALLED_BY_LIBRARIES)
    vulture = Vulture(ignore_names=names, ignore_decorators=CALLED_BY_DECORATORS)
    vulture.scavenge([str(folder) for folder in folders], exclude=[f"*{g}" for g in GENERATED])
    return [
        f"{item.filename}:{item.first_lineno}: {item.typ} {item.name}"
        for item in vulture.get_unused_code(min_confidence=60)
        if item.typ in KINDS and "tinsmithd" in Path(item.filename).parts
    ]


def test_no_server_has_dead_code() -> None:
    found = unused([ROOT / "services", ROOT / "client", ROOT / "protos"])
    assert not found, "\n".join(found)


def test_a_planted_unused_function_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "tinsmithd" / "x.py"
    planted.parent.mkdir()
    planted.write_text("def used():\n    pass\n\n\ndef unused():\n    pass\n\n\nused()\n")
    assert unused([tmp_path]) == [f"{planted}:5: function unused"]
