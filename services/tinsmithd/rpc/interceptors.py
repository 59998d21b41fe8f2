"""What every call passes through: errors become statuses, answers become the same bytes.

- A `TinsmithError` becomes its status; anything else becomes INTERNAL with a request id, and the
  cause goes to the log under that id, never to the caller.
- Requests are read by `Intake`: bytes that are no message of the expected type are
  INVALID_ARGUMENT, not INTERNAL; one that is too large says which limit it is over.
- Answers are serialised deterministically, so that a repeat is equal byte for byte.
- Every call passes a `Gate`: it has a place, counted bytes, and ends where its peer stalls. All
  handlers therefore read their messages themselves, as those of request streams do; on the wire
  there is no difference.
"""

import abc
import asyncio
import functools
import inspect
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from tinsmithd.config import ServerConfig
from tinsmithd.errors import Internal, TinsmithError
from tinsmithd.processes.event_loop import take_turns
from tinsmithd.rpc import calls, flow
from tinsmithd.rpc.flow import CHECK_METHOD, Flow, Gate, is_exempt
from tinsmithd.rpc.intake import Intake
from tinsmithd.rpc.status import to_status

_log = logging.getLogger(__name__)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _serialize_counted(message: Message) -> bytes:
    data = message.SerializeToString(deterministic=True)
    flow.current().sent_bytes += len(data)
    return data


class WrappingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped base
    """Wraps each method of this project's services, once; standard services pass untouched."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return the handler of one call; that of a method is always the same."""
        method: str = details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(details)
        if handler is None or not self.covers(method, handler):
            return handler
        self._wrapped[method] = wrapped = self.wrap(handler, method)
        return wrapped

    def covers(self, method: str, handler: Any) -> bool:
        """Whether this one is for a method (`/package.Service/Method`)."""
        return method.startswith("/tinsmith.")

    @abc.abstractmethod
    def wrap(self, handler: Any, method: str) -> Any:
        """Wrap the handler of a method (`/package.Service/Method`)."""


class CallInterceptor(WrappingInterceptor):
    """Lets calls through a gate, makes statuses of errors and the same bytes of equal answers.

    Args:
        gate: What the calls of the server share.
        config: Has the limits of a message, see `Intake`.
    """

    def __init__(self, gate: Gate, config: ServerConfig) -> None:
        super().__init__()
        self._gate = gate
        self._config = config

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """See `WrappingInterceptor`."""
        if details.method != CHECK_METHOD:
            take_turns()
        return await super().intercept_service(continuation, details)

    def covers(self, method: str, handler: Any) -> bool:
        """See `WrappingInterceptor`; covers standard services too, except for `is_exempt` ones."""
        return not is_exempt(method, _behavior(handler))

    def wrap(self, handler: Any, method: str) -> Any:
        """See `WrappingInterceptor`."""
        # The generated handler has `Message.FromString`, a method of the class.
        intake = Intake(
            handler.request_deserializer.__self__,
            self._config.message_bytes_max,
            self._config.message_items_max,
            own=not method.startswith("/tinsmith.v1."),
        )
        logs = self._config.log_calls
        read = _Reading(self._gate, intake, method, streaming=handler.request_streaming, logs=logs)
        write = _serialize_counted if logs else _serialize
        if handler.response_streaming:
            stream = _guard_stream(_behavior(handler), read)
            return grpc.stream_stream_rpc_method_handler(stream, response_serializer=write)
        unary = _guard_unary(_behavior(handler), read)
        return grpc.stream_unary_rpc_method_handler(unary, response_serializer=write)


@dataclass(frozen=True)
class _Reading:
    """How the calls of one method come in."""

    gate: Gate
    intake: Intake
    method: str
    streaming: bool
    logs: bool

    def flow(self, context: Any) -> Flow:
        return self.gate.flow(context, self.method, functools.partial(self.abort, context))

    async def requests(self, flow: Flow) -> Any:
        """What a servicer gets: the request, or the stream of them."""
        if self.streaming:
            return self.intake.stream(flow.messages())
        return await self.intake.request(await flow.message())

    async def abort(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        """End a call with an error."""
        await _abort(context, error, self.method)


def rebuilt(handler: Any, behavior: Any) -> Any:
    """The handler of a method that `CallInterceptor` has wrapped, with another behavior."""
    build = (
        grpc.stream_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.stream_unary_rpc_method_handler
    )
    return build(
        behavior,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _behavior(handler: Any) -> Any:
    return (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )


def _guard_unary(behavior: Any, reading: _Reading) -> Any:
    async def respond(flow: Flow, context: grpc.aio.ServicerContext) -> Any:
        return await behavior(await reading.requests(flow), context)

    return functools.wraps(behavior)(_guarded(respond, reading))


def _guard_stream(behavior: Any, reading: _Reading) -> Any:
    async def respond(flow: Flow, context: grpc.aio.ServicerContext) -> None:
        requests = await reading.requests(flow)
        if inspect.iscoroutinefunction(behavior):  # it writes by itself, as standard services do
            await behavior(requests, context)
            return
        async with aclosing(behavior(requests, context)) as responses:
            async for response in responses:
                await flow.write(response)

    return functools.wraps(behavior)(_guarded(respond, reading))


def _guarded(respond: Any, reading: _Reading) -> Any:
    async def guarded(_: Any, context: grpc.aio.ServicerContext) -> Any:
        with calls.served(context, reading.method), reading.flow(context) as messages:
            if reading.logs:
                calls.log_at_end(reading.method, messages, context)
            try:
                messages.take_place()
                return await respond(messages, context)
            except asyncio.CancelledError:
                raise
            except grpc.aio.AbortError as error:
                forget_frames(error)
                raise
            except Exception as error:
                failure = error
            # Out of the handler, so that what is raised now does not keep the failure. The status
            # may wait behind what the caller does not read: until then the call has its place, so
            # that nobody can pile such calls up, and nothing else.
            messages.handed_over()
            await reading.abort(context, failure)

    return guarded


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions held that an error came through.

    grpc keeps the error with its call, in a cycle: megabytes would wait for the garbage collector.
    The frames themselves are not cleared: one error can be many callers' answer, and to clear the
    frame of a coroutine that waits ends that coroutine, without a word.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if isinstance(error, TinsmithError) and not isinstance(error, Internal):
        request_id = calls.ended_with(str(error.reason))
        # Its caller hears what it says; a log has nothing that a caller wrote.
        _log.info("%s refused [%s] %s", method, request_id, error)
        status = to_status(error, request_id)
    else:
        request_id = calls.ended_with(type(error).__name__)
        _log.error("%s failed [%s]", method, request_id, exc_info=error)
        status = to_status(Internal(), request_id)
    forget_frames(error)
    try:
        await context.abort_with_status(rpc_status.to_status(status))
    except (grpc.aio.InternalError, grpc.aio.UsageError) as gone:
        # The caller went away, or has been told of something else already.
        raise asyncio.CancelledError from gone
