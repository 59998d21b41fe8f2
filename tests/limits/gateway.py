"""The named limits of a gateway; it speaks HTTP, so its refusals say their limit in words."""

import contextlib
import http.client
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateways import RunningGateway, running_gateway
from limits.held import Case, Limits, Refusal
from sdk_calls import Sdk
from tinsmith.gateway.v1 import tinker_pb2 as tinker
from tinsmithd.config import GatewaySettings

MIB = 1024 * 1024
SETTINGS: dict[str, Any] = {
    "body_bytes_max": 32 * MIB,
    "openai_body_bytes_max": 31 * MIB,
    "body_items_max": 20_000,
    "openai_choices_max": 4,
    "requests_max": 6,
    "peer_share_max": 1.0,
    "poll_s_max": 30,
}
ELSEWHERE = {
    "received_bytes_max": "tests/service/test_gateway_training.py",
    "peer_share_max": "tests/attack/test_gateway.py",
    "request_s_max": "tests/service/test_gateway_training.py",
    "poll_s_max": "tests/attack/test_gateway.py",
    "results_under_way_max": "tests/service/test_gateway_shares.py",
    "results_bytes_max": "tests/service/test_gateway_shares.py",
}
"""Limits that are no matter of one request more, and who holds them."""
NAMES = {name for name in GatewaySettings.__annotations__ if name.endswith("_max")}
"""All that there are: the gateway has no capabilities that would say them."""
WAIT_S = 60.0


@contextlib.contextmanager
def gateway_limits(training_address: str, folder: Path) -> Iterator["GatewayLimits"]:
    """A gateway with small limits in front of a cluster, for the body of the `with`."""
    with running_gateway(training_address, folder, **SETTINGS) as gateway:
        yield GatewayLimits(gateway)


class GatewayLimits(Limits):
    """Makes the requests.

    Args:
        gateway: Runs with `SETTINGS`.
    """

    otherwise = ("body_items_max",)

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self._sdk = Sdk(gateway)
        self._numbers = iter(range(1_000_000))
        served = self._sdk.asked_get("get_server_capabilities")["supported_models"]
        self._base_model = served[0]["model_name"]
        cases: Mapping[str, Case] = {
            "body_bytes_max": lambda n: self._post("/api/v1/client/config", b"{}".ljust(n)),
            "body_items_max": self._items,
            "openai_body_bytes_max": lambda n: self._complete(nbytes=n),
            "openai_choices_max": lambda n: self._complete(n=n),
            "requests_max": self._requests,
        }
        super().__init__(gateway.pid, {name: int(SETTINGS[name]) for name in cases}, cases)

    def _post(self, path: str, body: bytes, **headers: str) -> None:
        with contextlib.closing(self._connection()) as connection, self.sending(len(body)):
            connection.request("POST", path, body, headers=headers)
            _check(connection.getresponse())

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._gateway.url.removeprefix("http://"), timeout=WAIT_S)

    def _items(self, items: int) -> None:
        # Four bytes of text are one; fifty are enough for what is around them.
        count = items if self.above else items - 50
        body = tinker.ForwardBackwardRequest(model_id="x" * 4 * count).SerializeToString()
        headers = {"content-type": "application/x-protobuf"}
        self._post("/api/v1/forward_backward", body, **headers)

    def _complete(self, nbytes: int = 0, n: int = 1) -> None:
        asked = {"model": self._base_model, "prompt": [1, 2, 3], "max_tokens": 1, "n": n}
        body = json.dumps(asked).encode().ljust(nbytes)
        self._post("/v1/completions", body, **{"content-type": "application/json"})

    def _requests(self, count: int) -> None:
        """Polls for results that do not come, and one request more."""
        model_id = self._sdk.model(next(self._numbers))
        step = {"model_id": model_id, "seq_id": 2, "adam_params": {}}  # 1 does not come
        poll = json.dumps({"request_id": self._sdk.post("optim_step", step)["request_id"]})
        with contextlib.ExitStack() as stack:
            for _ in range(count - 1):
                waiting = stack.enter_context(contextlib.closing(self._connection()))
                waiting.request("POST", "/api/v1/retrieve_future", poll)
            # None of these says that it has come: above, what is too much is tried until it is.
            for _ in range(500 if self.above else 1):
                self._post("/api/v1/client/config", b"{}")


def _check(response: http.client.HTTPResponse) -> None:
    """Raise what a request was refused with."""
    said = response.read().decode()
    if response.status >= 400:
        limit = re.search(r"(\w+_max)\b", said)
        raise Refusal(str(response.status), "", limit[1] if limit else "")
