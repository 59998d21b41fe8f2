"""Makes `tinsmithd/reasons.py` of `error_reason.proto`; `make protos` runs it.

The rules of the servers know no protobuf, and the table of reasons must not be written twice.
"""

import importlib
import sys
from pathlib import Path

HEAD = '''"""Why a call can fail, and what comes with each reason.

Made from `protos/tinsmith/v1/error_reason.proto` by `make protos`. Do not edit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Rule:
    """What always holds for a reason.

    Attributes:
        status: Name of its gRPC status code.
        metadata: Keys that may come with it.
        retry: Whether there is a delay after which the same call can succeed: never, always or
            sometimes.
    """

    status: str
    metadata: frozenset[str]
    retry: str


class Reason(StrEnum):
    """Machine-readable cause, sent as `google.rpc.ErrorInfo.reason`."""

'''
RETRIES = ("never", "always", "sometimes")


def made(stubs: str) -> str:
    """The text of the module.

    Args:
        stubs: Folder of the generated stubs.
    """
    sys.path.insert(0, stubs)
    pb = importlib.import_module("tinsmith.v1.error_reason_pb2")
    prefix = "ERROR_REASON_"
    rules = {
        value.name.removeprefix(prefix): value.GetOptions().Extensions[pb.error_rule]
        for value in pb.ErrorReason.DESCRIPTOR.values
        if value.number
    }
    lines = [f'    {name} = "{name}"' for name in rules]
    lines += ["", "", "RULES: Mapping[Reason, Rule] = {"]
    for name, rule in rules.items():
        keys = ", ".join(f'"{key}"' for key in sorted(rule.metadata))
        metadata = f"frozenset({{{keys}}})" if keys else "frozenset()"
        lines += [
            f"    Reason.{name}: Rule(",
            f'        "{rule.status}", {metadata}, "{RETRIES[rule.retry]}"',
            "    ),",
        ]
    return HEAD + "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(made(sys.argv[1]))
