"""Rank 0's end of the stream to the Training server, and the loop that all ranks share.

Rank 0 says hello and stands by until it is welcomed, however long that takes; then its group is at
work. Rank 0 reads a command and broadcasts its bytes, and every rank carries it out. When the
stream ends, the Training server is gone or has given the group's place to another group, so the
models here are nobody's. The ranks drop them, keep the base model and attach again.

A group that was stopped for a while and goes on may finish its command and answer on a stream that
is over. Nobody reads that answer, and no further command comes on that stream.
"""

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import grpc

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.config import ConfigError
from tinsmithd.convert import types as convert
from tinsmithd.formats import release
from tinsmithd.rpc import link_secret, link_version
from tinsmithd.rpc.channels import open_channel, tls_hint
from tinsmithd.sizes import NO_WORK, Work
from tinsmithd.tls import Certificates
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.registry import Engines
from tinsmithd.trainer.outgoing import Outgoing
from tinsmithd.trainer.process_group.stall import Memory

ALIVE_INTERVAL_S = 2.0
"""Seconds between two messages in which rank 0 says that it lives."""
LEAVE_S = 0.1
"""Seconds that a last word gets to leave this process."""
RETRY_DELAY_S = 0.2
"""Seconds before the next attempt after a stream that held; doubled by each one that did not."""
RETRY_DELAY_S_MAX = 5.0
RANKS_SAID_MAX = 256
"""Ranks of which memory is said, the first ones: as many as the Training server takes."""

_ATTACH = "/{}/{}".format(pb.DESCRIPTOR.services_by_name["TrainerLinkService"].full_name, "Attach")
_FORGET = b""
"""Broadcast in place of a command: drop all models."""

Memories = Callable[[], Mapping[int, Memory]]
"""What each rank has of memory, by rank."""
Broadcast = Callable[[bytes | None], bytes]
"""Rank 0 passes bytes, the other ranks pass None; all get rank 0's bytes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkTarget:
    """Where rank 0 attaches.

    Attributes:
        address: `link_address` of the Training server.
        secret_file: File that holds the secret of the link. It is read for each stream, so that a
            new secret needs no restart.
        certificates: By what the server and this rank know each other; None is plain text. Each
            stream begins with what the files hold then.
    """

    address: str
    secret_file: str
    certificates: Certificates | None = None

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Metadata that a stream begins with: the secret."""
        try:
            return link_secret.shown(link_secret.read(self.secret_file, link_secret.RANKS_KEY))
        except ConfigError as error:  # it was there at the start; the server says no
            _log.error("%s", error)
            return ()


class Link:
    """One stream to the Training server; messages may be sent from any thread.

    Attributes:
        commands: Messages of the server, each a serialized `AttachResponse`: the other ranks get
            those bytes.
        welcomed: Whether the group is, or was, at work on this stream.
        send: Sends a message.
        send_later: Waits until nothing else is to be sent, then sends a message; False once the
            stream is over.
    """

    def __init__(self, server: LinkTarget) -> None:
        self._server = server
        self._channel = open_channel(server.address, certificates=server.certificates)
        self._outgoing = Outgoing()
        self.welcomed = False
        self.send = self._outgoing.put
        self.send_later = self._outgoing.put_later
        attach: grpc.StreamStreamMultiCallable = self._channel.stream_stream(
            _ATTACH, request_serializer=pb.AttachRequest.SerializeToString
        )
        self.commands: Iterator[bytes] = attach(iter(self._outgoing), metadata=server.metadata())
        # The end must be known at once, since a copy of a state may be waiting to be sent.
        if not self.commands.add_callback(self._outgoing.end):
            self._outgoing.end()

    def say_alive(self, memories: Memories) -> None:
        """Say every two seconds that this process lives, until the stream is over.

        Args:
            memories: What each rank has of memory, which is said with it.
        """

        def say() -> None:
            while not self._outgoing.ended.wait(ALIVE_INTERVAL_S):
                self.send(pb.AttachRequest(alive=_alive(memories())))
                if self._server.certificates is not None:
                    self._server.certificates.current()  # a person hears when it is about to expire

        threading.Thread(target=say, name="alive", daemon=True).start()

    def leave(self) -> None:
        """Say that this process was asked to end; the caller ends it soon after."""
        self.send(pb.AttachRequest(leaving=pb.Leaving()))
        time.sleep(LEAVE_S)

    def close(self) -> None:
        """End the stream."""
        self._outgoing.end()
        self._channel.close()


def _alive(memories: Mapping[int, Memory]) -> pb.Alive:
    return pb.Alive(
        memory=[
            pb.RankMemory(rank=rank, **dataclasses.asdict(memories[rank]))
            for rank in sorted(memories)[:RANKS_SAID_MAX]
        ]
    )


def hello(
    engines: Engines,
    engine_name: str,
    world_size: int,
    launch_token: str = "",
    work: Work = NO_WORK,
) -> pb.AttachRequest:
    """Make the message that says that the group is ready.

    Args:
        engines: What it holds.
        engine_name: What computes.
        world_size: Number of ranks.
        launch_token: What the launcher gave it.
        work: What a token costs.
    """
    return pb.AttachRequest(
        hello=pb.Hello(
            base_model=convert.base_model_to_pb(engines.info),
            world_size=world_size,
            engine=engine_name,
            identity=engines.identity,
            launch_token=launch_token,
            link_version=link_version.said(),
            release=release(),
            token_weights=work.weights,
            attention_width=work.attention_width,
        )
    )


class LoadingLink:
    """Tells the Training server how far loading is, if the server can be reached."""

    def __init__(self, server: LinkTarget) -> None:
        self._link = Link(server)
        # Nobody needs the answers of this stream, but reading them keeps the call alive.
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            for _ in self._link.commands:
                pass
        except grpc.RpcError as error:
            # A person should hear of a wrong secret before the base model is loaded.
            level = logging.ERROR if _is_mistake(error) else logging.DEBUG
            _log.log(level, "the Training server did not take progress (%s)", _why(error))

    def say(self, message: str) -> None:
        """Pass one line on."""
        self._link.send(pb.AttachRequest(loading=pb.Loading(message=message)))

    def close(self) -> None:
        """End the stream."""
        self._link.close()


def lead(
    commands: Commands,
    server: LinkTarget,
    greeting: pb.AttachRequest,
    broadcast: Broadcast,
    on_link: Callable[[Link], None] = lambda _: None,
    memories: Memories = dict,
) -> None:
    """Rank 0: attach, carry out commands with the group, attach again when the stream ends.

    Args:
        commands: What carries them out.
        server: Where to attach.
        greeting: See `hello`.
        broadcast: Passes commands on to the other ranks.
        on_link: Takes each stream as it begins.
        memories: See `Link.say_alive`.
    """
    delay_s = RETRY_DELAY_S
    while True:
        link = Link(server)
        on_link(link)
        link.send(greeting)
        link.say_alive(memories)
        start_s = time.monotonic()
        try:
            for data in link.commands:
                _carry_out(data, commands, link, broadcast)
        except grpc.RpcError as error:
            _log.log(
                logging.ERROR if _is_mistake(error) else logging.WARNING,
                "the stream to the Training server at %s broke (%s)",
                *(server.address, _why(error)),
            )
        else:
            _log.info("the Training server ended the stream")
        finally:
            link.close()
        broadcast(_FORGET)
        commands.forget_models()
        if link.welcomed or time.monotonic() - start_s > RETRY_DELAY_S_MAX:
            delay_s = RETRY_DELAY_S
        time.sleep(delay_s * random.uniform(0.75, 1.25))
        delay_s = min(2 * delay_s, RETRY_DELAY_S_MAX)


def _carry_out(data: bytes, commands: Commands, link: Link, broadcast: Broadcast) -> None:
    command = pb.AttachResponse.FromString(data)
    if command.HasField("welcome"):
        link.welcomed = True
        _log.info(
            "at work, in epoch %d, for a Training server of release %s",
            *(command.welcome.epoch, command.welcome.release or "unknown"),
        )
        return
    broadcast(data)
    commands.apply(command, link.send, link.send_later)


def follow(commands: Commands, broadcast: Broadcast) -> None:
    """Other ranks: carry out what rank 0 broadcasts, until the process ends."""
    while True:
        data = broadcast(None)
        if data == _FORGET:
            commands.forget_models()
        else:
            commands.apply(pb.AttachResponse.FromString(data), lambda _: None)


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN


def _is_mistake(error: grpc.RpcError) -> bool:
    """Whether somebody has to change something: a secret, a certificate, a release."""
    refused = (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    return _code(error) in refused or bool(tls_hint(error))


def _why(error: grpc.RpcError) -> str:
    if not isinstance(error, grpc.Call):
        return type(error).__name__
    hint = ""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        hint = "; training_target must be the server's link_address, not the port of its clients"
    elif tls := tls_hint(error):
        hint = f"; {tls}"
    return f"{error.code().name}: {error.details() or ''}{hint}"
