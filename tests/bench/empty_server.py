"""A server that computes nothing: what remains of a step is what the SDK itself takes.

As `remote` runs it.
It answers what a program asks for that trains one model, each result before it is waited for.
"""

import threading
import time

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tinsmith.gateway.v1 import tinker_pb2
from tinsmithd.gateway.tinker.config import flags_for

SESSION = "s-" + "0" * 32


class EmptyServer:
    """Serves from a thread.

    Args:
        data: Data of each call.
        tokens: Tokens of each datum.
    """

    def __init__(self, data: int, tokens: int) -> None:
        self._output = _output(data, tokens)
        routes = [Route("/api/v1/{path:path}", self._answer, methods=["POST"])]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        threading.Thread(target=self._server.run, daemon=True).start()

    def port(self) -> int:
        """Where it listens, once it does."""
        while not self._server.started:
            time.sleep(0.01)
        found: int = self._server.servers[0].sockets[0].getsockname()[1]
        return found

    async def _answer(self, request: Request) -> Response:
        path = request.path_params["path"]
        body = await request.body()
        if path == "client/config":
            return JSONResponse(flags_for(request.scope))
        if path == "create_session":
            return JSONResponse({"session_id": SESSION})
        if path == "telemetry":
            return JSONResponse({"status": "accepted"})
        if path == "get_info":
            names = {"model_name": "tiny-llama", "tokenizer_id": "tiny-llama"}
            return JSONResponse({"model_id": f"{SESSION}:train:0", "model_data": names})
        if path != "retrieve_future":
            return JSONResponse({"request_id": path})
        if b"forward_backward" in body:
            return Response(self._output, media_type="application/x-protobuf")
        if b"optim_step" in body:
            return JSONResponse({"metrics": {}})
        return JSONResponse({"model_id": f"{SESSION}:train:0"})


def _output(data: int, tokens: int) -> bytes:
    output = tinker_pb2.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    output.metrics["loss:sum"] = 0.0
    record = output.loss_fn_outputs.add(num_datums=data)
    field = record.fields["logprobs"]
    field.data = np.zeros(data * tokens, "<f4").tobytes()
    field.offsets = (np.arange(data + 1, dtype="<i8") * 4 * tokens).tobytes()
    field.dtype = tinker_pb2.D_TYPE_FLOAT32
    return output.SerializeToString()
