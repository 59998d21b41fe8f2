"""Models: created from nothing or from a checkpoint, described, and deleted."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from tinsmith.errors import TinsmithError
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.ids import check_session_id, model_id_of
from tinsmithd.gateway.tinker.paths import shown, stored
from tinsmithd.gateway.tinker.promises import promise_id
from tinsmithd.gateway.tinker.room import (
    Room,
    bool_of,
    int_of,
    object_of,
    text_of,
    texts_of,
)

KIND = "create"
UNLOAD = "unload"
RANK = 32
SEED_MAX = 2**64 - 1
RANK_MAX = 2**31 - 1


def check_optimizer(config: Mapping[str, Any], field: str) -> None:
    """Refuse optimizers that there are none of.

    Raises:
        Problem: 400, naming those that there are.
    """
    name = text_of(config, "type", "adamw")
    if name not in ("adamw", "adam"):
        message = f"{field}: there is no optimizer {name[:40]!r} here, only adamw"
        raise Problem(400, message, field=field)


def _lora_of(body: Mapping[str, Any]) -> dict[str, Any]:
    config = object_of(body, "lora_config")
    lora: dict[str, Any] = {"rank": int_of(config, "rank", RANK, least=1, most=RANK_MAX)}
    if config.get("seed") is not None:
        # Python's SDK sends any integer; two that differ in more than 64 bits are not told apart.
        lora["seed"] = int_of(config, "seed", least=-(2**63), most=SEED_MAX) & SEED_MAX
    for name in ("train_unembed", "train_mlp", "train_attn"):
        lora[name] = bool_of(config, name, True)
    return lora


def _new_model_of(body: Mapping[str, Any]) -> dict[str, Any]:
    session_id = check_session_id(text_of(body, "session_id"))
    check_optimizer(object_of(body, "optimizer_config"), "optimizer_config")
    return {
        "model_id": model_id_of(session_id, int_of(body, "model_seq_id")),
        "user_metadata": texts_of(body, "user_metadata"),
    }


def creation_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_model` asks for, as the content of a promise.

    Raises:
        Problem: 400 or 404.
    """
    return {
        **_new_model_of(body),
        "base_model": text_of(body, "base_model"),
        "lora": _lora_of(body),
    }


def loaded_creation_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_weights` with a session asks for: a new model of a checkpoint.

    Raises:
        Problem: 400 or 404.
    """
    return {
        **_new_model_of(body),
        "base_model": text_of(body, "base_model", ""),
        "path": stored(text_of(body, "path"), "path"),
        "with_optimizer": bool_of(body, "optimizer", False),
    }


class Models:
    """Makes models.

    Args:
        room: The room.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        room.promises.add_kind(KIND, self._create)
        room.promises.add_kind(UNLOAD, self._unload)

    async def start(self, content: dict[str, Any]) -> Response:
        """Begin to make a model; answers its promise.

        Raises:
            Problem: 404: there is no such base model.
        """
        if content["base_model"]:
            content["base_model"] = await self._served(content["base_model"])
        name = promise_id(KIND, content)
        self._room.promises.start(name)
        return JSONResponse({"request_id": name, "model_id": content["model_id"]})

    async def _served(self, name: str) -> str:
        held = [each.name for each in (await self._room.cluster.capabilities()).base_models]
        # While the ranks load nobody knows what there will be: then the Training server says it.
        return self._room.names.served(name, held) if held else name

    async def _create(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        model_id = text_of(content, "model_id")
        request = pb.CreateModelRequest(
            base_model=text_of(content, "base_model", ""),
            user_metadata=texts_of(content, "user_metadata"),
            model_id=model_id,
            request_id=model_id,
        )
        if path := text_of(content, "path", ""):
            request.checkpoint_path = path
            request.with_optimizer = bool_of(content, "with_optimizer", False)
        else:
            lora = _lora_of({"lora_config": object_of(content, "lora")})
            request.lora_config.CopyFrom(types_pb2.LoraConfig(**lora))

        async def attempt() -> pb.CreateModelResponse:
            return await self._room.cluster.training.CreateModel(request)

        created = await self._room.cluster.retrying("create_model", attempt)
        if path:
            return {"path": shown(path), "model_id": created.model.model_id, "type": "load_weights"}
        return {"model_id": created.model.model_id, "type": "create_model"}

    async def info(self, model_id: str) -> Mapping[str, Any]:
        """What `get_info` answers."""
        request = pb.GetModelRequest(model_id=model_id)

        async def attempt() -> pb.Model:
            return (await self._room.cluster.training.GetModel(request)).model

        model = await self._room.cluster.asking("get_info", attempt)
        found = await self._room.cluster.capabilities()
        held = {each.name: each.architecture for each in found.base_models}
        names = self._room.names
        shown = names.public(model.base_model)
        is_lora = model.WhichOneof("tuning") == "lora_config"
        about = {
            "model_id": model_id,
            "model_data": {
                "arch": held.get(model.base_model, "unknown"),
                "model_name": shown,
                "tokenizer_id": names.tokenizer_id(model.base_model),
            },
            "is_lora": is_lora,
            "model_name": shown,
            "optimizer_config": {"type": "adamw"},
            "type": "get_info",
        }
        return {**about, "lora_rank": model.lora_config.rank} if is_lora else about

    async def unload(self, model_id: str) -> Response:
        """Begin to delete a model, whose checkpoints stay; answers its promise.

        Raises:
            Problem: 404: there is no such model.
        """
        await self.info(model_id)
        name = promise_id(UNLOAD, {"model_id": model_id})
        self._room.promises.start(name)
        return JSONResponse({"request_id": name, "model_id": model_id})

    async def _unload(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        model_id = text_of(content, "model_id")
        request = pb.DeleteModelRequest(model_id=model_id)

        async def attempt() -> None:
            await self._room.cluster.training.DeleteModel(request)

        try:
            await self._room.cluster.retrying("unload_model", attempt)
        except TinsmithError as error:
            if error.reason != "MODEL_NOT_FOUND":  # a repeat
                raise
        return {"model_id": model_id, "type": "unload_model"}
