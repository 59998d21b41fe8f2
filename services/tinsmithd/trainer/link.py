"""Rank 0's end of the stream to the Training server, and the loop that all ranks share.

Rank 0 reads a command, broadcasts its bytes, and every rank carries it out. A stream that ends
means that the Training server is gone and nobody knows the models any more: the ranks drop them,
keep the base model and attach again.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.internal.v1.trainer_link_service_pb2_grpc import TrainerLinkServiceStub
from tinsmithd.convert import types as convert
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.interface import TrainingEngine

RETRY_DELAY_S_MAX = 5.0
RESULTS_BYTES_MAX = 1024 * 1024
"""Results are put together up to so many bytes, and those of one datum more."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
_FORGET = b""
"""Broadcast in place of a command: drop all models."""

Broadcast = Callable[[bytes | None], bytes]
"""Rank 0 passes bytes, the others None; all get rank 0's bytes."""

_log = logging.getLogger(__name__)


class Link:
    """One stream to the Training server; messages may be sent from any thread."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._outgoing: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        stub = TrainerLinkServiceStub(self._channel)
        self.commands: Iterator[pb.AttachResponse] = stub.Attach(self._messages())

    def send(self, message: pb.AttachRequest) -> None:
        """Send one message."""
        self._outgoing.put(message)

    def _messages(self) -> Iterator[pb.AttachRequest]:
        """What was sent, in order; results that wait together go out as one message."""
        held: pb.AttachRequest | None = None
        while True:
            message, held = held or self._outgoing.get(), None
            if message is None:
                return
            while message.HasField("results") and message.ByteSize() < RESULTS_BYTES_MAX:
                try:
                    following = self._outgoing.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    yield message
                    return
                if not following.HasField("results"):
                    held = following
                    break
                # Of the same command: each ends with a message of another kind.
                message.results.MergeFrom(following.results)
            yield message

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._channel.close()


def hello(engine: TrainingEngine, engine_name: str, world_size: int) -> pb.AttachRequest:
    """The message that says that the group is ready."""
    info = convert.base_model_to_pb(engine.info)
    return pb.AttachRequest(
        hello=pb.Hello(base_model=info, world_size=world_size, engine=engine_name)
    )


class LoadingLink:
    """Tells the Training server how far loading is, as far as it can be reached."""

    def __init__(self, target: str) -> None:
        self._link = Link(target)
        # The answer of this stream is of no interest, but reading it keeps the call alive.
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            for _ in self._link.commands:
                pass
        except grpc.RpcError as error:
            _log.debug("progress was not taken: %s", error)

    def say(self, message: str) -> None:
        """Pass one line on."""
        self._link.send(pb.AttachRequest(loading=pb.Loading(message=message)))

    def close(self) -> None:
        """End the stream."""
        self._link.close()


def lead(commands: Commands, target: str, greeting: pb.AttachRequest, broadcast: Broadcast) -> None:
    """Rank 0: attach, carry out commands with the group, attach again when the stream ends."""
    delay_s = 0.2
    while True:
        link = Link(target)
        link.send(greeting)
        try:
            for command in link.commands:
                delay_s = 0.2
                broadcast(command.SerializeToString())
                commands.apply(command, link.send)
        except grpc.RpcError as error:
            _log.warning("no Training server at %s (%s)", target, _code(error))
        else:
            _log.warning("the Training server ended the stream")
        finally:
            link.close()
        broadcast(_FORGET)
        commands.forget_models()
        time.sleep(delay_s * random.uniform(0.75, 1.25))
        delay_s = min(2 * delay_s, RETRY_DELAY_S_MAX)


def follow(commands: Commands, broadcast: Broadcast) -> None:
    """Other ranks: carry out what rank 0 broadcasts, for ever."""
    while True:
        data = broadcast(None)
        if data == _FORGET:
            commands.forget_models()
        else:
            commands.apply(pb.AttachResponse.FromString(data), lambda _: None)


def _code(error: grpc.RpcError) -> str:
    return error.code().name if isinstance(error, grpc.Call) else type(error).__name__
