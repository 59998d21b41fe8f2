"""`error_reason.proto` is the table of reasons: the code says nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

import tinsmithd
from tinsmith import errors as client_errors
from tinsmith.v1 import error_reason_pb2
from tinsmithd import errors
from tinsmithd.errors import Reason
from tinsmithd.reasons import RULES
from tinsmithd.rpc.status import from_rpc_error, from_status, to_status
from tinsmithd.trainer.answers import failed
from wire import error_in

CLASSES = {
    "InvalidArgument": "INVALID_ARGUMENT",
    "Unauthenticated": "UNAUTHENTICATED",
    "PermissionDenied": "PERMISSION_DENIED",
    "NotFound": "NOT_FOUND",
    "AlreadyExists": "ALREADY_EXISTS",
    "FailedPrecondition": "FAILED_PRECONDITION",
    "ResourceExhausted": "RESOURCE_EXHAUSTED",
    "Unavailable": "UNAVAILABLE",
    "DataLoss": "DATA_LOSS",
    "Internal": "INTERNAL",
}
OF_THE_SERVERS_KEY = {Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED}
GIVEN_ELSEWHERE = {"INTERNAL": "by its class", "INVALID_FIELD": "by default"}

Found = tuple[str, str, str, ast.Call, ast.AST]
"""File and line, class, reason, the call, and what it stands in."""


def refusals() -> Iterator[Found]:
    """Every place where a server makes an error of ours with a reason in so many words."""
    root = Path(tinsmithd.__path__[0])
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text())
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        for scope in [*functions, tree]:
            for call in ast.walk(scope):
                if not isinstance(call, ast.Call):
                    continue
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name in CLASSES:
                    where = f"{file.relative_to(root)}:{call.lineno}"
                    for reason in reasons_in(call):
                        yield where, name, reason, call, scope


def reasons_in(call: ast.Call) -> Iterator[str]:
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    for argument in arguments:
        for node in ast.walk(argument):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "Reason":
                yield node.attr


def metadata_keys(call: ast.Call, scope: ast.AST) -> set[str]:
    """Keys of the metadata that a call gives, also where the dictionary has a name."""
    for keyword in call.keywords:
        if keyword.arg != "metadata":
            continue
        value: ast.AST = keyword.value
        if isinstance(value, ast.Name):
            value = next(
                node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign) and value.id in map(_name, node.targets)
            )
        if isinstance(value, ast.Dict):
            return {key.value for key in value.keys if isinstance(key, ast.Constant)}
    return set()


def _name(node: ast.AST) -> str:
    return getattr(node, "id", "")


def test_every_reason_has_a_rule_with_a_status_and_a_comment() -> None:
    assert set(RULES) == set(Reason)
    values = error_reason_pb2.ErrorReason.DESCRIPTOR.values
    assert {v.name.removeprefix("ERROR_REASON_") for v in values if v.number} == set(Reason)
    for reason, rule in RULES.items():
        assert rule.status in grpc.StatusCode.__members__, reason


def test_the_code_refuses_as_the_table_says() -> None:
    """Status, metadata and delay of every refusal in the code are those of its reason's rule."""
    wrong, seen = [], set(GIVEN_ELSEWHERE)
    for where, name, reason, call, scope in refusals():
        rule = RULES[Reason(reason)]
        seen.add(reason)
        if CLASSES[name] != rule.status:
            wrong.append(f"{where}: {reason} is {rule.status}, not {CLASSES[name]}")
        if extra := metadata_keys(call, scope) - rule.metadata:
            wrong.append(f"{where}: {reason} has no metadata {sorted(extra)}")
        delayed = any(keyword.arg == "retry_after_s" for keyword in call.keywords)
        if rule.retry != "sometimes" and delayed != (rule.retry == "always"):
            wrong.append(f"{where}: a delay comes with {reason} {rule.retry}")
    assert not wrong, "\n".join(sorted(set(wrong)))
    assert seen == set(Reason), "a reason that nothing gives"


class Failure(grpc.RpcError):
    """What a stub raises."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[code_pb2.Code.Name(self._status.code)]

    def details(self) -> str:
        return str(self._status.message)

    def trailing_metadata(self) -> object:
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


@pytest.mark.parametrize("reason", list(Reason))
def test_an_error_comes_through_two_servers_unchanged(reason: Reason) -> None:
    """Status, reason, field, metadata and delay: what one server says, the next one can say."""
    rule = RULES[reason]
    cls = getattr(errors, next(name for name, code in CLASSES.items() if code == rule.status))
    metadata = {key: f"of {key}" for key in sorted(rule.metadata - {"field"})}
    if cls is errors.Internal:
        error = cls()
    elif cls is errors.InvalidArgument:
        error = cls("data[3]", "is wrong", reason, metadata=metadata)
    else:
        delay = None if rule.retry == "never" else 0.0
        error = cls("no", reason, metadata=metadata, retry_after_s=delay)
    status = to_status(error, "id")
    assert code_pb2.Code.Name(status.code) == rule.status
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert set(info.metadata) <= {"request_id", *rule.metadata}
    assert retry.HasField("retry_delay") == (rule.retry != "never")
    again = from_rpc_error(Failure(status), Reason.CHECKPOINT_UNAVAILABLE)
    if reason in OF_THE_SERVERS_KEY:  # not the caller's affair, who waits until it is mended
        assert again.reason is Reason.CHECKPOINT_UNAVAILABLE
    else:
        assert (to_status(again, "id"), type(again)) == (status, cls)
    # A rank says it to its Training server, and that one to the caller.
    from_rank = error_in(failed(error))
    assert (to_status(from_rank, "id"), type(from_rank)) == (status, cls)
    raised = client_errors.from_rpc_error(Failure(status))
    assert (raised.reason, raised.field, raised.request_id) == (reason, error.field, "id")
    assert raised.metadata == ({} if cls is errors.Internal else metadata)
    assert raised.retry_after_s == error.retry_after_s
    assert raised.code is grpc.StatusCode[rule.status]


def test_a_reason_with_another_reasons_code_is_nobodys() -> None:
    """Whoever says so is no Tinsmith server, and its delay is not that of the reason."""
    status = to_status(errors.NotFound("no", Reason.MODEL_NOT_FOUND), "id")
    status.code = code_pb2.UNAVAILABLE
    assert from_status(status) is None
    assert type(from_rpc_error(Failure(status), Reason.CHECKPOINT_UNAVAILABLE)) is errors.Internal
