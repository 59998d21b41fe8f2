"""Which request created which model: a repeat gets the first model, not another."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from tinsmithd.errors import AlreadyExists, Reason
from tinsmithd.training.models.model import Model

REQUEST_IDS_KEPT_MAX = 10_000


class KnownRequests:
    """The newest `request_id`s of creates, each with its digest and the model that it made."""

    def __init__(self) -> None:
        # By owner and id: those of two owners are two requests.
        self._known: OrderedDict[tuple[str, str], tuple[bytes, asyncio.Future[Model]]]
        self._known = OrderedDict()

    def remember(self, model: Model) -> None:
        """A model was created before this process began."""
        if model.request_id:
            made: asyncio.Future[Model] = asyncio.get_running_loop().create_future()
            made.set_result(model)
            self._add((model.owner, model.request_id), model.request_digest, made)

    async def once(
        self,
        owner: str,
        request_id: str,
        digest: bytes,
        create: Callable[[], Coroutine[Any, Any, Model]],
    ) -> Model:
        """Create a model, unless this request did or does; one that failed may be tried again.

        A caller that goes away does not stop it: that would leave half a model behind.

        Raises:
            AlreadyExists: The request had other content (REQUEST_ID_CONFLICT).
        """
        if not request_id:
            return await asyncio.shield(asyncio.create_task(create()))
        known = self._known.get((owner, request_id))
        if known is None or (known[1].done() and _failed(known[1])):
            known = self._add((owner, request_id), digest, asyncio.create_task(create()))
        if known[0] != digest:
            message = f"request_id {request_id!r} was used with other content"
            raise AlreadyExists(message, Reason.REQUEST_ID_CONFLICT)
        return await asyncio.shield(known[1])

    def _add(
        self, request: tuple[str, str], digest: bytes, made: "asyncio.Future[Model]"
    ) -> "tuple[bytes, asyncio.Future[Model]]":
        self._known[request] = digest, made
        while len(self._known) > REQUEST_IDS_KEPT_MAX:
            self._known.popitem(last=False)
        return digest, made


def _failed(made: "asyncio.Future[Model]") -> bool:
    return made.cancelled() or made.exception() is not None
