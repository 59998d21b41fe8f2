"""Which models there are: base models by all their names, and checkpoints by their paths."""

import asyncio
import functools
from collections.abc import Mapping, Sequence

from tinsmith.v1 import checkpoint_service_pb2
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.gateway.cluster import CHECKPOINT, SAMPLER, Cluster, Work
from tinsmithd.gateway.names import BaseModelNames
from tinsmithd.gateway.openai.tokenizer import Tokenizer
from tinsmithd.gateway.problems import Problem

SCHEMES = ("tinker://", "tinsmith://")
KNOWN_S = 10.0
"""How old what the Sampler said of itself may be."""


class Models:
    """Knows the models that can be sampled, and their tokenizers.

    Args:
        cluster: Where they are.
        names: What clients call them.
    """

    def __init__(self, cluster: Cluster, names: BaseModelNames) -> None:
        self._cluster = cluster
        self._names = names
        self._held: Mapping[str, int] = {}
        self._held_s = float("-inf")
        self._reading: dict[str, asyncio.Task[Tokenizer]] = {}

    async def held(self) -> Mapping[str, int]:
        """Base models that the Sampler holds, with their context's length in tokens.

        Raises:
            Problem: 503 while there is none.
        """
        loop = asyncio.get_running_loop()
        if not self._held or loop.time() - self._held_s > KNOWN_S:
            request = pb.SamplerServiceGetCapabilitiesRequest()
            attempt = functools.partial(
                self._cluster.on_a_sampler,
                Work(),
                lambda sampler: sampler.GetCapabilities(request, timeout=5.0),
            )
            found = await self._cluster.asking("get_capabilities", attempt, service=SAMPLER)
            self._held = {model.name: model.context_length for model in found.base_models}
            self._held_s = loop.time()
        if not self._held:
            why = "the Sampler is loading its base model"
            raise Problem(503, why, "SAMPLER_UNAVAILABLE", is_servers=True, retry_after_s=1.0)
        return self._held

    async def find(self, name: str) -> tuple[str, str]:
        """The base model that is meant, and the checkpoint's path or nothing.

        Raises:
            Problem: 404: there is no such base model. A checkpoint is looked for by the Sampler.
        """
        held = await self.held()
        if not name.startswith(SCHEMES):
            return self._names.served(name, held), ""
        if len(held) == 1:
            return next(iter(held)), name
        return self._names.served(await self._base_of(name), held), name

    async def _base_of(self, path: str) -> str:
        request = checkpoint_service_pb2.GetCheckpointRequest(checkpoint_path=path)

        async def ask() -> checkpoint_service_pb2.GetCheckpointResponse:
            return await (await self._cluster.checkpoint()).GetCheckpoint(request)

        found = await self._cluster.asking("get_checkpoint", ask, service=CHECKPOINT)
        return found.checkpoint.base_model

    async def listed(self) -> Sequence[tuple[str, str, int]]:
        """Name, base model and context length of each name of each base model."""
        held = await self.held()
        return [
            (name, served, held[served])
            for name in self._names.all(held)
            for served in [self._names.served(name, held)]
        ]

    async def one(self, name: str) -> tuple[str, str, int]:
        """The same for one model, which may be a checkpoint.

        Raises:
            Problem: 404: there is none.
        """
        held = await self.held()
        is_path = name.startswith(SCHEMES)
        served = self._names.served(await self._base_of(name) if is_path else name, held)
        return name, served, held[served]

    async def tokenizer(self, served: str) -> Tokenizer:
        """A base model's tokenizer; it is fetched once."""
        if served not in self._reading:
            self._reading[served] = asyncio.create_task(self._read(served))
        task = self._reading[served]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._reading.get(served) is task:
                del self._reading[served]
            raise

    async def _read(self, served: str) -> Tokenizer:
        request = pb.GetTokenizerRequest(base_model=served)

        async def make(sampler: "object") -> dict[str, bytearray]:
            files: dict[str, bytearray] = {}
            async for response in sampler.GetTokenizer(request):  # type: ignore[attr-defined]
                files.setdefault(response.file_name, bytearray()).extend(response.data)
            return files

        attempt = functools.partial(self._cluster.on_a_sampler, Work(), make)
        files = await self._cluster.asking("get_tokenizer", attempt, service=SAMPLER)
        return await asyncio.to_thread(Tokenizer, {k: bytes(v) for k, v in files.items()})
