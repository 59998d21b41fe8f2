"""What a stock Tinker SDK sends to a gateway, without the SDK."""

import http.client
import time
from typing import Any

import numpy as np

from gateways import RunningGateway, ask
from tinsmith.gateway.v1 import tinker_pb2 as tinker

PATH = "/api/v1"
PATIENCE_S = 60.0


def packed(values: Any, dtype: str) -> tinker.Tensor:
    array = np.asarray(values, {"float32": "<f4", "int64": "<i8"}[dtype])
    kind = {"float32": tinker.D_TYPE_FLOAT32, "int64": tinker.D_TYPE_INT64}[dtype]
    return tinker.Tensor(dense=array.tobytes(), dtype=kind, shape=array.shape)


def datum(**inputs: tinker.Tensor) -> tinker.Datum:
    tokens = np.array([5, 6, 7, 8], "<i4").tobytes()
    chunk = tinker.Chunk(encoded_text=tinker.EncodedTextChunk(tokens=tokens))
    filled = {"target_tokens": packed([6, 7, 8, 9], "int64"), **inputs}
    return tinker.Datum(model_input=[chunk], loss_fn_inputs=filled)


def call(model_id: str, seq_id: int, **fields: Any) -> bytes:
    filled = {"loss_fn": "cross_entropy", "data": [datum()], **fields}
    message = tinker.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, **filled)
    return message.SerializeToString()


class Sdk:
    """What the SDK does, one request at a time.

    Args:
        gateway: Where to.
        patient: Send a request again, as the SDK does, where nobody answers it.
    """

    def __init__(self, gateway: RunningGateway, *, patient: bool = False) -> None:
        self.gateway = gateway
        self._patient = patient
        self.session_id = self.post("create_session", {})["session_id"]

    def asked(self, path: str, body: Any) -> tuple[int, Any]:
        return self._ask(f"{PATH}/{path}", body)

    def _ask(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                status, found = ask(self.gateway, path, body, headers=headers)
            except (OSError, http.client.HTTPException):
                if not self._patient or time.monotonic() > until_s:
                    raise
            else:
                if status < 500 or not self._patient or time.monotonic() > until_s:
                    return status, found
            time.sleep(0.02)

    def post(self, path: str, body: Any) -> Any:
        status, found = self.asked(path, body)
        assert status == 200, found
        return found

    def result(self, promise: dict[str, Any], accept: str = "application/x-protobuf") -> Any:
        status, found = 408, None
        asked = {"request_id": promise["request_id"]}
        while status == 408:
            status, found = self._ask(f"{PATH}/retrieve_future", asked, Accept=accept)
        assert status == 200, found
        return found

    def passed(self, promise: dict[str, Any]) -> tinker.ForwardBackwardOutput:
        found = self.result(promise)
        assert isinstance(found, bytes), found
        return tinker.ForwardBackwardOutput.FromString(found)

    def model(self, number: int = 0, **fields: Any) -> str:
        base = self.asked_get("get_server_capabilities")["supported_models"][0]["model_name"]
        body = {
            "session_id": self.session_id,
            "model_seq_id": number,
            "base_model": base,
            "lora_config": {"rank": 2, "seed": 1},
            **fields,
        }
        model_id: str = self.result(self.post("create_model", body))["model_id"]
        assert model_id == f"{self.session_id}:train:{number}"
        return model_id

    def asked_get(self, path: str) -> Any:
        return self._ask(f"{PATH}/{path}", None)[1]
