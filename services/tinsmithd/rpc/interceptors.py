"""What every call passes through: errors become statuses, answers become the same bytes.

- A `TinsmithError` becomes its status; anything else becomes INTERNAL with a request id, and the
  cause goes to the log under that id, never to the caller.
- Requests are read by `Intake`: bytes that are no message of the expected type are
  INVALID_ARGUMENT, not INTERNAL; one that is too large says which limit it is over.
- Answers are serialised deterministically, so that a repeat is equal byte for byte.
"""

import abc
import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from tinsmithd.errors import Internal, TinsmithError
from tinsmithd.rpc.intake import Intake
from tinsmithd.rpc.status import to_status

_log = logging.getLogger(__name__)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


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
        if handler is None or not method.startswith("/tinsmith."):
            return handler
        self._wrapped[method] = wrapped = self.wrap(handler, method)
        return wrapped

    @abc.abstractmethod
    def wrap(self, handler: Any, method: str) -> Any:
        """Wrap the handler of a method (`/package.Service/Method`)."""


class ErrorInterceptor(WrappingInterceptor):
    """Makes statuses of errors and the same bytes of equal answers.

    Args:
        message_bytes_max: A larger request is refused, with a reason.
        message_items_max: Likewise one of more items, see `Intake`.
    """

    def __init__(self, message_bytes_max: int, message_items_max: int) -> None:
        super().__init__()
        self._message_bytes_max = message_bytes_max
        self._message_items_max = message_items_max

    def wrap(self, handler: Any, method: str) -> Any:
        """See `WrappingInterceptor`."""
        # The generated handler has `Message.FromString`, a method of the class.
        kind = handler.request_deserializer.__self__
        own = method.startswith("/tinsmith.internal.")
        intake = Intake(kind, self._message_bytes_max, self._message_items_max, own=own)
        return rebuilt(
            handler,
            functools.partial(_guard_unary, method=method, intake=intake),
            functools.partial(_guard_stream, method=method, intake=intake),
            request_deserializer=None,  # grpc would do it on the event loop, whatever it takes
            response_serializer=_serialize,
        )


def rebuilt(
    handler: Any,
    unary: Callable[[Any], Any],
    stream: Callable[[Any], Any],
    **codecs: Callable[[Any], Any] | None,
) -> Any:
    """A handler of the same kind around another behavior.

    Args:
        handler: The handler as it is.
        unary: Wraps a behavior that returns its response.
        stream: Wraps a behavior that yields its responses.
        codecs: `request_deserializer` and `response_serializer` of the new handler.
    """
    if handler.response_streaming:
        wrapped = stream(handler.unary_stream or handler.stream_stream)
        build = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
    else:
        wrapped = unary(handler.unary_unary or handler.stream_unary)
        build = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
    return build(wrapped, **codecs)


async def _read(intake: Intake, request: Any) -> Any:
    if hasattr(request, "__aiter__"):
        return intake.stream(request)
    return await intake.request(request)


def _guard_unary(behavior: Any, method: str, intake: Intake) -> Any:
    @functools.wraps(behavior)
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behavior(await _read(intake, request), context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _guard_stream(behavior: Any, method: str, intake: Intake) -> Any:
    @functools.wraps(behavior)
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in behavior(await _read(intake, request), context):
                yield response
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError):
            raise
        except Exception as error:
            await _abort(context, error, method)

    return guarded


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    request_id = secrets.token_hex(8)
    if isinstance(error, TinsmithError) and not isinstance(error, Internal):
        _log.info("%s refused [%s] %s: %s", method, request_id, error.reason, error.message)
        status = to_status(error, request_id)
    else:
        _log.error("%s failed [%s]", method, request_id, exc_info=error)
        status = to_status(Internal(), request_id)
    await context.abort_with_status(rpc_status.to_status(status))
