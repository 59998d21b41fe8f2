"""Somebody who only asks whether a server is well, as a kubelet does. See `remote`."""

import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PAUSE_S = 0.005


class HealthProbe:
    """Asks again and again, from a thread.

    Args:
        address: Of the server.
        service: Its name.
    """

    def __init__(self, address: str, service: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._request = health_pb2.HealthCheckRequest(service=service)
        self._asking: threading.Thread | None = None
        self._stop = threading.Event()
        self._found: list[tuple[float, float]] = []

    def start(self) -> None:
        """Begin to ask."""
        self._stop.clear()
        self._found = []
        self._asking = threading.Thread(target=self._ask)
        self._asking.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            start_s = time.perf_counter()
            time.sleep(PAUSE_S)
            woken_s = time.perf_counter()
            answer = self._stub.Check(self._request, timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            late_s = woken_s - start_s - PAUSE_S
            self._found.append((time.perf_counter() - woken_s, late_s))

    def stop(self) -> list[tuple[float, float]]:
        """Ask no more; returns how long each answer took, and how late the pause before it ended,
        which is the machine's doing, seconds."""
        assert self._asking is not None
        self._stop.set()
        self._asking.join()
        return self._found
