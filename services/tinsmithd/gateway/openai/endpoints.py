"""The endpoints: read a request, make the calls of it, write the answer."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinsmith import tensors
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.bodies import Bodies
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.names import BaseModelNames
from tinsmithd.gateway.openai import answers, calls
from tinsmithd.gateway.openai.answers import Job
from tinsmithd.gateway.openai.errors import answered
from tinsmithd.gateway.openai.fields import Asked, ChatAsked, CompletionAsked, read
from tinsmithd.gateway.openai.models import Models
from tinsmithd.gateway.openai.stream import CallerLeft, EventStream, until_left
from tinsmithd.gateway.openai.templates import TemplateProblem
from tinsmithd.gateway.openai.tokenizer import Tokenizer
from tinsmithd.gateway.openai.turns import Turns
from tinsmithd.gateway.problems import Problem

PREFIXES = ("/v1", "/oai/api/v1")
MAX_TOKENS = 16
"""Of a completion that says nothing else, as at OpenAI. A chat has as many as there is room for."""
SEED_BITS = 62
SMALL_BYTES = 64 * 1024
"""A body up to this size is read at once, a larger one beside the event loop."""
READERS = 2
"""Large bodies, long texts and chats that are read at once; callers take turns."""
_GONE = 499
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class OpenAI:
    """The API.

    Args:
        cluster: What samples.
        names: What clients call base models.
        settings: Its limits.
    """

    def __init__(self, cluster: Cluster, names: BaseModelNames, settings: GatewaySettings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._models = Models(cluster, names)
        self._bodies = Bodies(settings, "openai_body_bytes_max")
        self._turns = Turns(READERS)
        self._started_s = int(time.time())

    # --- what there is ------------------------------------------------------------------------

    @answered
    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        found = [self._model(*each) for each in await self._models.listed()]
        return JSONResponse({"object": "list", "data": found})

    @answered
    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`, which may be the path of a checkpoint."""
        return JSONResponse(self._model(*await self._models.one(request.path_params["name"])))

    def _model(self, name: str, served: str, context_length: int) -> Mapping[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "tinsmith",
            "root": served,
            "max_model_len": context_length,
        }

    @answered
    async def nothing(self, request: Request) -> Response:
        """What else is below the prefixes."""
        raise Problem(404, f"{request.method} {request.url.path[:200]} is not served here")

    # --- completions --------------------------------------------------------------------------

    @answered
    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked, size = await self._asked(request, CompletionAsked)
        base_model, path = await self._models.find(asked.model)
        tokenizer = await self._models.tokenizer(base_model)
        most = self._settings.openai_choices_max
        if len(asked.prompt) * asked.samples > most:
            why = f"prompt: {len(asked.prompt)} prompts and n is {asked.samples}, "
            why += f"openai_choices_max is {most}"
            raise Problem(400, why, "LIMIT_EXCEEDED", "prompt")
        context = (await self._models.held())[base_model]
        prompts = await self._off_loop(size, _prompts_of, tokenizer, asked.prompt, context)
        max_tokens = MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        echoes = None
        if asked.echo:
            texts = (
                asked.prompt if isinstance(asked.prompt[0], str) else map(tokenizer.decode, prompts)
            )
            echoes = list(texts)
        job = Job(
            model=asked.model,
            tokenizer=tokenizer,
            prompts=prompts,
            samples=asked.samples,
            stops=asked.stop or [],
            chat=False,
            logprobs=asked.logprobs is not None,
            top=asked.logprobs or 0,
            echoes=echoes,
            samples_tokens=max_tokens > 0,
            usage=asked.includes_usage,
        )
        scores = job.echoes is not None and job.logprobs
        made = [
            self._call(base_model, path, prompt, asked, max_tokens, job.top, scores=scores)
            for prompt in prompts
            if scores or max_tokens
        ]
        return await self._answer(request, asked, job, made)

    @answered
    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked, size = await self._asked(request, ChatAsked)
        if asked.top_logprobs and not asked.logprobs:
            raise Problem(400, "top_logprobs: needs logprobs", "INVALID_FIELD", "top_logprobs")
        if asked.max_tokens == 0:
            raise Problem(400, "max_tokens: must be at least 1", "INVALID_FIELD", "max_tokens")
        if asked.samples > self._settings.openai_choices_max:
            why = f"n: {asked.samples}, openai_choices_max is {self._settings.openai_choices_max}"
            raise Problem(400, why, "LIMIT_EXCEEDED", "n")
        base_model, path = await self._models.find(asked.model)
        tokenizer = await self._models.tokenizer(base_model)
        context = (await self._models.held())[base_model]
        prompt = await self._off_loop(size, _chat_of, tokenizer, asked, context)
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        job = Job(
            model=asked.model,
            tokenizer=tokenizer,
            prompts=[prompt],
            samples=asked.samples,
            stops=asked.stop or [],
            chat=True,
            logprobs=bool(asked.logprobs),
            top=asked.top_logprobs or 0,
            usage=asked.includes_usage,
        )
        made = [self._call(base_model, path, prompt, asked, max_tokens, job.top, scores=False)]
        return await self._answer(request, asked, job, made)

    async def _asked(self, request: Request, kind: type[Any]) -> tuple[Any, int]:
        """What is asked for, and the bytes in which it was."""
        async with self._bodies.read(request) as body:
            if len(body) <= SMALL_BYTES:
                return read(kind, body), len(body)
            return await self._off_loop(len(body), read, kind, body), len(body)

    async def _off_loop(self, size: int, work: Any, *arguments: Any) -> Any:
        async with self._turns.turn(size):
            return await asyncio.to_thread(work, *arguments)

    def _call(
        self,
        base_model: str,
        path: str,
        prompt: Sequence[int],
        asked: Asked,
        max_tokens: int | None,
        top: int,
        *,
        scores: bool,
    ) -> calls.Request:
        """The Sampler's call for one prompt."""
        request: calls.Request
        if max_tokens == 0:
            request = pb.ComputeLogprobsRequest(topk_prompt_logprobs=top)
        else:
            request = pb.SampleRequest(
                num_samples=asked.samples,
                include_prompt_logprobs=scores,
                topk_prompt_logprobs=top if scores else 0,
                topk_sample_logprobs=top,
            )
            params = request.sampling_params
            for name in ("temperature", "top_p", "top_k"):
                if (value := getattr(asked, name)) is not None:
                    setattr(params, name, value)
            if max_tokens is not None:
                params.max_tokens = max_tokens
            # Drawn here where there is none, so that a call that is made again is the same.
            params.seed = secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed % 2**64
            params.stop.eos = True
            params.stop.strings.extend(asked.stop or [])
        request.base_model, request.checkpoint_path = base_model, path
        tensors.write(request.prompt.chunks.add().tokens, np.asarray(prompt, np.int64))
        return request

    async def _answer(
        self, request: Request, asked: Asked, job: Job, made: Sequence[calls.Request]
    ) -> Response:
        """Make the calls and answer; when the caller leaves, they end."""
        streams = bool(asked.stream)
        within_s = self._settings.request_s_max
        parts = calls.Calls(self._cluster, made, within_s, streams=streams)
        try:
            if not streams:
                async with parts:
                    return JSONResponse(await until_left(request, answers.whole(job, parts)))
            events = answers.events(job, parts)
            await parts.__aenter__()
            try:
                first = await until_left(request, anext(events))
            except BaseException:
                await events.aclose()
                await parts.close()
                raise
        except CallerLeft:
            return Response(status_code=_GONE)
        return EventStream(first, events, self._settings.stream_stall_s, parts.close)


def _prompts_of(
    tokenizer: Tokenizer, prompts: Sequence[Any], context: int
) -> Sequence[Sequence[int]]:
    """The tokens of prompts, each of them checked."""
    found: list[Sequence[int]] = []
    for index, prompt in enumerate(prompts):
        field = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
        is_text = isinstance(prompt, str)
        tokens = _encoded(tokenizer, prompt, context, field, begins=True) if is_text else prompt
        found.append(_fitting(tokens, context, field))
    return found


def _chat_of(tokenizer: Tokenizer, asked: ChatAsked, context: int) -> Sequence[int]:
    """The tokens of a chat, up to where the model is to speak."""
    tools = None if asked.tool_choice == "none" else asked.tools
    template = tokenizer.template(tools=tools is not None)
    messages = [message.for_template() for message in asked.messages]
    most = tokenizer.characters_max(context)
    try:
        text = template.render(messages, tools, asked.chat_template_kwargs or {}, most)
    except TemplateProblem as problem:
        raise Problem(400, f"messages: {problem}"[:500], "INVALID_FIELD", "messages") from None
    # The template writes all special tokens that there are to be.
    return _fitting(
        _encoded(tokenizer, text, context, "messages", begins=False), context, "messages"
    )


def _encoded(
    tokenizer: Tokenizer, text: str, context: int, field: str, *, begins: bool
) -> Sequence[int]:
    most = tokenizer.characters_max(context)
    if len(text) > most:  # it cannot fit, and is not worth the time
        raise _too_long(field, f"{len(text)} characters", context)
    return tokenizer.encode(text, begins=begins)


def _fitting(tokens: Sequence[int], context: int, field: str) -> Sequence[int]:
    if not tokens:
        raise Problem(400, f"{field}: has no tokens", "INVALID_FIELD", field)
    if len(tokens) > context:
        raise _too_long(field, f"{len(tokens)} tokens", context)
    return tokens


def _too_long(field: str, what: str, context: int) -> Problem:
    why = f"{field}: {what}, context_length is {context}"
    return Problem(400, why, "LIMIT_EXCEEDED", field, metadata={"limit": "context_length"})


def routes(cluster: Cluster, settings: GatewaySettings) -> Sequence[BaseRoute]:
    """The routes, below both prefixes.

    Args:
        cluster: What samples.
        settings: Limits, and names of base models.
    """
    names = BaseModelNames(settings.base_models, settings.tokenizer_ids)
    api = OpenAI(cluster, names, settings)
    found: list[BaseRoute] = []
    for prefix in PREFIXES:
        found += [
            Route(f"{prefix}/models", api.models, methods=["GET"]),
            Route(f"{prefix}/models/{{name:path}}", api.model, methods=["GET"]),
            Route(f"{prefix}/completions", api.completions, methods=["POST"]),
            Route(f"{prefix}/chat/completions", api.chat_completions, methods=["POST"]),
            Route(f"{prefix}/{{rest:path}}", api.nothing, methods=_METHODS),
        ]
    return found
