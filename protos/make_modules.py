"""Makes what Python code has of the contract besides its stubs; `make protos` runs it.

    python protos/make_modules.py DESCRIPTORS FOLDER

`DESCRIPTORS` is a FileDescriptorSet of the contract with comments. Under `FOLDER` are written:

    client/tinsmith/v1/__init__.py    every message, enum and stub under one name
    services/tinsmithd/reasons.py     the rules of reasons: those of the servers know no protobuf
    docs/errors.md                    the same for people
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "tinsmith.v1"
PREFIX = "ERROR_REASON_"
RETRIES = ("never", "always", "sometimes")
WIDTH = 100

INIT_HEAD = '''"""The contract as Python: all messages and stubs, made from `protos/`.

This is a public interface of its own; `tinsmith.ServiceClient` is one user of it. A complete
script needs nothing else of ours but numpy (`examples/stubs_only.py`):

    from tinsmith import tensors, v1
    from tinsmith.cluster import connect

    cluster = connect("localhost:50051")
    info = cluster.training.GetCapabilities(v1.GetCapabilitiesRequest())

The comments in `protos/tinsmith/v1/*.proto` are its specification. Made by `make protos`: do not
edit.
"""

'''

REASONS_HEAD = '''"""Why a call can fail, and what comes with each reason.

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

DOCS_HEAD = """# Errors

<!-- Made from protos/tinsmith/v1/error_reason.proto by `make protos`. Do not edit. -->

"""
DOCS_RETRY = {"never": "no", "always": "yes", "sometimes": "where a delay comes with it"}


def package(files: FileDescriptorSet) -> str:
    """The text of `tinsmith/v1/__init__.py`."""
    names: dict[str, list[str]] = {}
    for file in files.file:
        if file.package != PACKAGE:
            continue
        module = file.name.removesuffix(".proto").replace("/", ".")
        things = [*file.message_type, *file.enum_type, *file.extension]
        if things:
            names[f"{module}_pb2"] = [thing.name for thing in things]
        for service in file.service:
            stubs = [f"{service.name}Servicer", f"{service.name}Stub"]
            stubs.append(f"add_{service.name}Servicer_to_server")
            names.setdefault(f"{module}_pb2_grpc", []).extend(stubs)
    lines = []
    for module in sorted(names):
        some = [f"    {name}," for name in sorted(names[module])]
        lines += [f"from {module} import (", *some, ")"]
    found = sorted(name for some in names.values() for name in some)
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in found), "]"]
    return INIT_HEAD + "\n".join(lines) + "\n"


class Reasons:
    """The reasons of a contract: name, rule and comment of each."""

    def __init__(self, files: FileDescriptorSet) -> None:
        pool = DescriptorPool()
        for file in files.file:
            pool.Add(file)
        options = GetMessageClass(pool.FindMessageTypeByName("google.protobuf.EnumValueOptions"))
        rule = pool.FindExtensionByName(f"{PACKAGE}.error_rule")
        (self._file,) = [f for f in files.file if f.name.endswith("/error_reason.proto")]
        comments = _comments(self._file)
        self.rules: dict[str, Any] = {}
        self.comments: dict[str, str] = {}
        index = [enum.name for enum in self._file.enum_type].index("ErrorReason")
        for place, value in enumerate(self._file.enum_type[index].value):
            if value.number:
                name = value.name.removeprefix(PREFIX)
                read = options.FromString(value.options.SerializeToString())
                self.rules[name] = read.Extensions[rule]
                self.comments[name] = comments[5, index, 2, place]
        message = [m.name for m in self._file.message_type].index("ErrorRule")
        self.about = comments[4, message]

    def module(self) -> str:
        """The text of `tinsmithd/reasons.py`."""
        lines = [f'    {name} = "{name}"' for name in self.rules]
        lines += ["", "", "RULES: Mapping[Reason, Rule] = {"]
        for name, rule in self.rules.items():
            keys = ", ".join(f'"{key}"' for key in sorted(rule.metadata))
            metadata = f"frozenset({{{keys}}})" if keys else "frozenset()"
            lines += [
                f"    Reason.{name}: Rule(",
                f'        "{rule.status}", {metadata}, "{RETRIES[rule.retry]}"',
                "    ),",
            ]
        return REASONS_HEAD + "\n".join([*lines, "}", ""])

    def page(self) -> str:
        """The text of `docs/errors.md`."""
        text = DOCS_HEAD + "".join(_wrapped(part) for part in self.about.split("\n\n"))
        for status in sorted({rule.status for rule in self.rules.values()}):
            text += f"## {status}\n\n"
            for name, rule in sorted(self.rules.items()):
                if rule.status == status:
                    text += _wrapped(f"**`{name}`** {self.comments[name]}")
                    keys = ", ".join(f"`{key}`" for key in rule.metadata) or "none of its own"
                    again = DOCS_RETRY[RETRIES[rule.retry]]
                    text += f"- Metadata: {keys}.\n- Same call again: {again}.\n\n"
        return text.rstrip() + "\n"


def _comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(place.path): "\n".join(
            line.strip() for line in place.leading_comments.strip().splitlines()
        )
        for place in file.source_code_info.location
    }


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False) + "\n\n"


def made(files: FileDescriptorSet) -> Iterator[tuple[str, str]]:
    """Each file, and its text."""
    reasons = Reasons(files)
    yield "client/tinsmith/v1/__init__.py", package(files)
    yield "services/tinsmithd/reasons.py", reasons.module()
    yield "docs/errors.md", reasons.page()


if __name__ == "__main__":
    descriptors, folder = map(Path, sys.argv[1:])
    for name, content in made(FileDescriptorSet.FromString(descriptors.read_bytes())):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
