"""Programs that wait for results which do not come, and one that says that it lives. See `remote`.

It speaks HTTP by itself, so that no client of anybody's is measured.
"""

import http.client
import json
import select
import socket
import time
from typing import Any

API = "/api/v1/"


class WaitingFutures:
    """Callers of one gateway.

    Args:
        host: Of the gateway.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._session_id = self._post("create_session", {})["session_id"]
        self._waiting: list[socket.socket] = []

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        self._connection.request("POST", API + path, json.dumps(body))
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer

    def wait(self, base_model: str, count: int) -> None:
        """Ask for the results of so many calls on a model, each over a connection of its own. Their
        turn does not come, since the one before them is never sent."""
        new = {"session_id": self._session_id, "model_seq_id": 0, "base_model": base_model}
        created = self._post("create_model", {**new, "lora_config": {"rank": 4}})
        model_id = self._post("retrieve_future", {"request_id": created["request_id"]})["model_id"]
        for seq_id in range(2, count + 2):
            call = {"model_id": model_id, "seq_id": seq_id, "adam_params": {}}
            body = json.dumps({"request_id": self._post("optim_step", call)["request_id"]})
            head = f"POST {API}retrieve_future HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            connection = socket.create_connection(self._address)
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            self._waiting.append(connection)

    def beat(self, count: int, pause_s: float) -> list[float]:
        """Say so many times that the session lives; returns how long each answer took, seconds."""
        found = []
        for _ in range(count):
            time.sleep(pause_s)
            begun_s = time.perf_counter()
            self._post("session_heartbeat", {"session_id": self._session_id})
            found.append(time.perf_counter() - begun_s)
        return found

    def still_waiting(self) -> int:
        """How many have heard nothing."""
        poll = select.poll()
        for connection in self._waiting:
            poll.register(connection, select.POLLIN)
        return len(self._waiting) - len(poll.poll(0))
