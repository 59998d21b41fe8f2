"""Calls on a model that carry no data: steps, saves, loads.

The promise of such a call has all of its content. So it is given at once: a gateway that dies
before the Training server has the call has lost nothing, since the next one makes it when it is
asked for the result; a repeat is answered with the first answer.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from tinsmith.checkpoints import EXTERNAL_PREFIX
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.ids import session_of_model
from tinsmithd.gateway.tinker.models import check_optimizer
from tinsmithd.gateway.tinker.paths import shown, stored
from tinsmithd.gateway.tinker.promises import promise_id
from tinsmithd.gateway.tinker.room import (
    INT64_MAX,
    Room,
    bool_of,
    int_of,
    number_of,
    object_of,
    text_of,
    texts_of,
)
from tinsmithd.gateway.tinker.samples import Weights

ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
KINDS = ("snapshot", "inflight")
Read = Callable[[Mapping[str, Any]], dict[str, Any]]


def numbered(body: Mapping[str, Any]) -> tuple[str, int]:
    """A call's model and number.

    Raises:
        Problem: 400, naming the field.
    """
    return text_of(body, "model_id"), int_of(body, "seq_id", least=1, most=INT64_MAX)


def _step_of(body: Mapping[str, Any]) -> dict[str, Any]:
    params = object_of(body, "adam_params")
    if body.get("optimizer_params") is not None:
        params = object_of(body, "optimizer_params")
        check_optimizer(params, "optimizer_params")
    return {key: number_of(params, key) for key in ADAM if params.get(key) is not None}


def _save_of(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": text_of(body, "path"),
        "ttl_s": int_of(body, "ttl_seconds", 0, least=1),
        "overwrite": bool_of(body, "overwrite", False),
        "user_metadata": texts_of(body, "user_metadata"),
    }


def _sampler_of(body: Mapping[str, Any]) -> dict[str, Any]:
    if text_of(body, "kind", KINDS[0]) not in KINDS:
        raise Problem(400, f"kind: must be one of {', '.join(KINDS)}", field="kind")
    if body.get("path") is not None:
        if text_of(body, "path").startswith(EXTERNAL_PREFIX):
            message = f"path: names that begin with {EXTERNAL_PREFIX!r} are external weights'"
            raise Problem(400, message, "INVALID_NAME", "path")
        return {**_save_of(body), "overwrite": False}
    session_id = session_of_model(text_of(body, "model_id"))
    if not session_id:
        text = "model_id: weights without a name are for models of a session"
        raise Problem(400, text, field="model_id")
    return {
        "session_id": session_id,
        "number": int_of(body, "sampling_session_seq_id"),
        "ttl_s": int_of(body, "ttl_seconds", 0, least=1),
    }


def _external_of(body: Mapping[str, Any]) -> dict[str, Any]:
    if body.get("age_encryption_recipients"):
        message = "age_encryption_recipients: files are not encrypted here; download them over TLS"
        raise Problem(400, message, field="age_encryption_recipients")
    return {**_save_of(body), "overwrite": False}


def _load_of(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": stored(text_of(body, "path"), "path"),
        "optimizer": bool_of(body, "optimizer", False),
    }


def lease_id_of(session_id: str, number: int) -> str:
    """The lease of a sampler without a name: nobody can guess it who does not know the session."""
    return hashlib.sha256(f"lease {session_id} {number}".encode()).hexdigest()[:32]


class Steps:
    """Makes these calls.

    Args:
        room: The room.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._reads: dict[str, Read] = {}
        for kind, read, make in (
            ("step", _step_of, self._step),
            ("save", _save_of, self._save),
            ("sampler", _sampler_of, self._save_for_sampler),
            ("external", _external_of, self._save_external),
            ("load", _load_of, self._load),
        ):
            self._reads[kind] = read
            room.promises.add_kind(kind, make)

    def start(self, kind: str, body: Mapping[str, Any]) -> Response:
        """Begin a call; answers its promise.

        Raises:
            Problem: 400; the number is used.
        """
        model_id, seq_id = numbered(body)
        try:
            content = {**self._reads[kind](body), "model_id": model_id, "seq_id": seq_id}
            name = promise_id(kind, content)
        except Problem:
            self._room.order.use_up_soon(model_id, seq_id)
            raise
        self._room.promises.start(name)
        return JSONResponse({"request_id": name, "model_id": model_id})

    async def _call(self, what: str, message: Any, content: Mapping[str, Any]) -> Any:
        model_id, seq_id = numbered(content)
        message.model_id, message.seq_id = model_id, seq_id
        method = {
            "optim_step": "OptimStep",
            "save_weights": "SaveCheckpoint",
            "load_weights": "LoadCheckpoint",
        }[what]

        def attempt() -> Awaitable[Any]:
            return getattr(self._room.cluster.training, method)(message)  # type: ignore[no-any-return]

        return await self._room.order.call(what, model_id, seq_id, attempt)

    async def _step(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        params = {key: number_of(content, key) for key in ADAM if key in content}
        message = pb.OptimStepRequest(adam_params=types_pb2.AdamParams(**params))
        answer = await self._call("optim_step", message, content)
        return {"metrics": dict(answer.metrics)}

    async def _save(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        message = _save_to_pb(types_pb2.CHECKPOINT_KIND_TRAINING, content)
        answer = await self._call("save_weights", message, content)
        return {"path": shown(answer.checkpoint_path), "type": "save_weights"}

    async def _save_for_sampler(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        message = _save_to_pb(types_pb2.CHECKPOINT_KIND_SAMPLER, content)
        if message.name:
            answer = await self._call("save_weights", message, content)
            path = shown(answer.checkpoint_path)
            return {"path": path, "type": "save_weights_for_sampler"}
        session_id, number = text_of(content, "session_id"), int_of(content, "number")
        message.lease_id = lease_id_of(session_id, number)
        answer = await self._call("save_weights", message, content)
        self._room.held.hold(session_id, answer.checkpoint_path, message.lease_id)
        weights = Weights("", answer.checkpoint_path, answer.digest)
        return {
            "sampling_session_id": weights.sampler_id(session_id, number),
            "type": "save_weights_for_sampler",
        }

    async def _save_external(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        message = _save_to_pb(types_pb2.CHECKPOINT_KIND_SAMPLER, content)
        message.name = f"{EXTERNAL_PREFIX}{message.name}"
        answer = await self._call("save_weights", message, content)
        path = shown(answer.checkpoint_path)
        return {"path": path, "type": "save_weights_external"}

    async def _load(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        message = pb.LoadCheckpointRequest(
            checkpoint_path=text_of(content, "path"),
            with_optimizer=bool_of(content, "optimizer", False),
        )
        await self._call("load_weights", message, content)
        path = shown(text_of(content, "path"))
        return {"path": path, "model_id": text_of(content, "model_id"), "type": "load_weights"}


def _save_to_pb(kind: "types_pb2.CheckpointKind.ValueType", content: Mapping[str, Any]) -> Any:
    message = pb.SaveCheckpointRequest(
        kind=kind,
        name=text_of(content, "name", ""),
        overwrite=bool_of(content, "overwrite", False),
        user_metadata=texts_of(content, "user_metadata"),
    )
    if ttl_s := int_of(content, "ttl_s", 0):
        message.ttl.seconds = ttl_s
    return message
