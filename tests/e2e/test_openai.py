"""OpenAI's API of the gateway, asked by OpenAI's own client, beside the Sampler's own answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from clusters import RunningCluster
from gateways import RunningGateway, running_gateway
from tinsmith import tensors
from tinsmith.cluster import Cluster
from tinsmith.v1 import sampler_service_pb2 as sampler_pb
from tinsmith.v1 import training_service_pb2 as training_pb
from tinsmith.v1 import types_pb2

MODEL = "tiny-llama"
PROMPT = "The kettle – wärm"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
CHAT_TEXT = f"<system>Be brief.\n<user>{PROMPT}\n<assistant>"


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="tml-any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def encode(tiny_model: Path) -> Any:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


class Sampled:
    """What the Sampler itself answers."""

    def __init__(self, stubs: Cluster, tokens: list[int], **fields: Any) -> None:
        stop = fields.pop("stop", [])
        request = sampler_pb.SampleRequest(**fields.pop("request", {}))
        request.prompt.chunks.add().tokens.CopyFrom(tensors.encode(np.array(tokens)))
        for name, value in fields.items():
            setattr(request.sampling_params, name, value)
        request.sampling_params.stop.eos = True
        request.sampling_params.stop.strings.extend(stop)
        count = request.num_samples or 1
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.topk: list[list[float]] = [[] for _ in range(count)]
        self.reasons = [0] * count
        self.scores = sampler_pb.PromptLogprobs()
        for response in stubs.sampler.Sample(request):
            self.scores.MergeFrom(response.prompt_logprobs)
            for delta in response.deltas:
                self.tokens[delta.sequence_index] += tensors.decode(delta.tokens).tolist()
                self.logprobs[delta.sequence_index] += tensors.decode(delta.logprobs).tolist()
                if delta.HasField("topk_logprobs"):
                    topk = tensors.decode(delta.topk_logprobs)
                    self.topk[delta.sequence_index] += topk.tolist()
                self.reasons[delta.sequence_index] = delta.stop_reason


def text_of(tiny_model: Path, tokens: list[int]) -> str:
    text: str = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).decode(tokens)
    return text


def near(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(found, wanted, rtol=0, atol=1e-6))


def test_a_completion_is_what_the_sampler_makes(
    client: openai.OpenAI, stubs: Cluster, encode: Any, tiny_model: Path
) -> None:
    """Tokens, logprobs and the likeliest ones, for each of n samples, whole and streamed."""
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    made = Sampled(
        stubs, encode(PROMPT), **params, request={"num_samples": 2, "topk_sample_logprobs": 3}
    )
    asked = {"model": MODEL, "prompt": PROMPT, "n": 2, "logprobs": 3, **params}
    whole = client.completions.create(**asked)
    texts, reasons = ["", ""], [None, None]
    logprobs: list[list[float]] = [[], []]
    usage = None
    for event in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage
        for choice in event.choices:
            assert usage is None
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    for index, choice in enumerate(whole.choices):
        assert choice.index == index
        assert choice.text == text_of(tiny_model, made.tokens[index]) == texts[index]
        assert near(choice.logprobs.token_logprobs, made.logprobs[index])
        assert near(logprobs[index], made.logprobs[index])
        for found, wanted in zip(choice.logprobs.top_logprobs, made.topk[index], strict=True):
            assert set(np.round(wanted, 5)) <= set(np.round(list(found.values()), 5))
        reason = "stop" if made.reasons[index] == sampler_pb.STOP_REASON_STOP else "length"
        assert choice.finish_reason == reasons[index] == reason
    assert usage == whole.usage.model_copy(
        update={"prompt_tokens_details": usage.prompt_tokens_details}
    )
    assert whole.usage.prompt_tokens == len(encode(PROMPT))
    assert whole.usage.completion_tokens == sum(map(len, made.tokens))


def test_a_text_is_scored_as_the_sampler_scores_it(
    client: openai.OpenAI, stubs: Cluster, encode: Any
) -> None:
    """echo with logprobs, and no new token or one: what evaluations take a likelihood from."""
    tokens = encode(PROMPT)
    request = sampler_pb.ComputeLogprobsRequest(topk_prompt_logprobs=1)
    request.prompt.chunks.add().tokens.CopyFrom(tensors.encode(np.array(tokens)))
    scores = stubs.sampler.ComputeLogprobs(request).prompt_logprobs
    wanted, best = tensors.decode(scores.logprobs), tensors.decode(scores.topk_logprobs)
    for prompt, made in [(PROMPT, 0), (tokens, 0), (tokens, 1)]:
        answer = client.completions.create(
            model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=made, temperature=0
        )
        (choice,) = answer.choices
        logprobs, count = choice.logprobs, len(tokens)
        assert len(logprobs.tokens) == count + made
        assert choice.text.startswith(PROMPT)
        assert logprobs.token_logprobs[0] is None
        assert near(logprobs.token_logprobs[1:count], wanted[1:])
        assert logprobs.top_logprobs[0] is None
        for found, most in zip(logprobs.top_logprobs[1:count], best[1:], strict=True):
            assert max(found.values()) == pytest.approx(most[0], rel=0, abs=1e-6)
        assert logprobs.text_offset == sorted(logprobs.text_offset)
        dash = len("The kettle ")
        assert logprobs.text_offset[: dash + 1] == list(range(dash + 1))
        assert logprobs.text_offset[dash : dash + 3] == [dash] * 3, "three bytes, one character"
        assert answer.usage.completion_tokens == made
    unscored = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, max_tokens=0)
    assert (unscored.choices[0].text, unscored.choices[0].logprobs) == (PROMPT, None)


def test_prompts_have_four_forms(client: openai.OpenAI, encode: Any) -> None:
    """A text, texts, tokens, lists of tokens; choices come in their order, n of each."""
    many = ["one", "two", PROMPT]
    params: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "seed": 3, "n": 2}
    alone = [
        choice.text
        for prompt in many
        for choice in client.completions.create(prompt=prompt, **params).choices
    ]
    for prompts in (many, [encode(each) for each in many]):
        found = client.completions.create(prompt=prompts, **params)
        assert [choice.text for choice in found.choices] == alone
        assert [choice.index for choice in found.choices] == list(range(6))
    assert client.completions.create(prompt=encode("one"), **params).choices[0].text == alone[0]


def test_a_chat_is_what_the_sampler_makes_of_its_template(
    client: openai.OpenAI, stubs: Cluster, encode: Any, tiny_model: Path
) -> None:
    params: dict[str, Any] = {"max_tokens": 9, "seed": 2}
    made = Sampled(stubs, encode(CHAT_TEXT), **params, request={"topk_sample_logprobs": 2})
    asked = {"model": MODEL, "messages": CHAT, "logprobs": True, "top_logprobs": 2, **params}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(tiny_model, made.tokens[0])
    entries = choice.logprobs.content
    assert near([entry.logprob for entry in entries], made.logprobs[0])
    tops = [[each.logprob for each in entry.top_logprobs] for entry in entries]
    assert near(tops, made.topk[0])
    assert whole.usage.prompt_tokens == len(encode(CHAT_TEXT))
    with client.chat.completions.create(**asked, stream=True) as stream:
        events = [event.choices[0] for event in stream]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == choice.message.content
    streamed = [entry for event in events for entry in event.logprobs.content]
    assert near([entry.logprob for entry in streamed], made.logprobs[0])
    assert [event.finish_reason for event in events][-1] == choice.finish_reason


def test_parts_and_the_newer_names_mean_the_same(client: openai.OpenAI) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, CHAT[1]]
    params: dict[str, Any] = {"model": MODEL, "seed": 2}
    new = client.chat.completions.create(messages=parts, max_completion_tokens=6, **params)
    old = client.chat.completions.create(messages=CHAT, max_tokens=6, **params)
    assert new.choices[0].message.content == old.choices[0].message.content
    assert new.usage.prompt_tokens == old.usage.prompt_tokens


def test_a_text_ends_before_its_stop_string(client: openai.OpenAI) -> None:
    """Whole and streamed; a part of it that came with an earlier token is not given out."""
    params: dict[str, Any] = {"model": MODEL, "messages": CHAT, "seed": 4, "max_tokens": 60}
    free = client.chat.completions.create(**params).choices[0].message.content
    assert free
    stop = free[5:8]
    for given in (stop, ["never", stop]):
        choice = client.chat.completions.create(**params, stop=given).choices[0]
        assert choice.message.content == free[: free.index(stop)]
        assert choice.finish_reason == "stop"
    events = client.chat.completions.create(**params, stop=stop, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == free[: free.index(stop)]


def _checkpoint(stubs: Cluster) -> str:
    lora = types_pb2.LoraConfig(rank=2, seed=1, train_mlp=True, train_attn=True)
    model = stubs.training.CreateModel(
        training_pb.CreateModelRequest(base_model=MODEL, lora_config=lora)
    ).model
    saved = stubs.training.SaveCheckpoint(
        training_pb.SaveCheckpointRequest(
            model_id=model.model_id,
            seq_id=1,
            kind=types_pb2.CHECKPOINT_KIND_SAMPLER,
            name="for-openai",
        )
    )
    return saved.checkpoint_path


def test_a_model_is_a_base_model_an_alias_or_a_path(
    client: openai.OpenAI, cluster: RunningCluster, stubs: Cluster, tmp_path: Path
) -> None:
    params: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "seed": 3}
    wanted = client.completions.create(model=MODEL, **params).choices[0].text
    path = _checkpoint(stubs)
    for name in (path, path.replace("tinsmith://", "tinker://")):
        # An adapter that was not trained changes nothing.
        assert client.completions.create(model=name, **params).choices[0].text == wanted
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model=path + "-absent", **params)
    assert refused.value.code == "model_not_found"
    aliases = {"base_models": '{"Smiths/tiny": "tiny-llama"}'}
    with running_gateway(cluster.address, tmp_path, **aliases) as other:
        url = f"{other.url}/oai/api/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as named:
            assert [model.id for model in named.models.list()] == ["Smiths/tiny", MODEL]
            for name in ("Smiths/tiny", "Smiths/tiny:fast"):
                answer = named.completions.create(model=name, **params)
                assert (answer.choices[0].text, answer.model) == (wanted, name)


REFUSED: list[tuple[str, Mapping[str, Any], int, str | None, str | None]] = [
    ("chat", {"model": "absent"}, 404, "base_model", "model_not_found"),
    ("chat", {"model": 3}, 400, "model", "invalid_value"),
    ("chat", {"messages": []}, 400, "messages", "invalid_value"),
    ("chat", {"messages": "hi"}, 400, "messages", "invalid_value"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", None),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    ("chat", {"max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
    ("chat", {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ("chat", {"max_tokens": 10**6}, 400, "max_tokens", "context_length_exceeded"),
    ("chat", {"max_tokens": 10**30}, 400, "max_tokens", None),
    ("chat", {"n": 0}, 400, "n", "invalid_value"),
    ("chat", {"n": 10**9}, 400, "n", None),
    ("chat", {"n": True}, 400, "n", "invalid_value"),
    ("chat", {"temperature": -1}, 400, "temperature", "invalid_value"),
    ("chat", {"top_p": 0}, 400, "top_p", "invalid_value"),
    ("chat", {"stop": [""]}, 400, "stop", "invalid_value"),
    ("chat", {"stop": [str(i) for i in range(100)], "max_tokens": 2}, 400, "stop", None),
    ("chat", {"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    ("chat", {"logprobs": True, "top_logprobs": 1000}, 400, "top_logprobs", None),
    ("chat", {"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter"),
    ("chat", {"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    ("chat", {"response_format": {"type": "json_object"}}, 400, "response_format", None),
    ("chat", {"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
    (
        "chat",
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "tools",
        "unsupported_parameter",
    ),
    ("text", {"prompt": None}, 400, "prompt", None),
    ("text", {"prompt": [[1], "a"]}, 400, "prompt", "invalid_value"),
    ("text", {"prompt": [-1]}, 400, "prompt", "invalid_value"),
    ("text", {"prompt": [2**40]}, 400, "prompt", "invalid_value"),
    ("text", {"prompt": [100_000]}, 400, "prompt", "token_out_of_range"),
    ("text", {"prompt": "x" * 600}, 400, "prompt", "context_length_exceeded"),
    ("text", {"prompt": "x" * 3_000_000}, 400, "prompt", "context_length_exceeded"),
    ("text", {"prompt": ["a", ""]}, 400, "prompt[1]", "invalid_value"),
    ("text", {"prompt": ["a"] * 5000}, 400, "prompt", "limit_exceeded"),
    ("text", {"prompt": ["a"], "best_of": 3}, 400, "best_of", "unsupported_parameter"),
    ("text", {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
]


@pytest.mark.parametrize(("kind", "body", "status", "param", "code"), REFUSED)
def test_what_is_wrong_is_said_in_openais_form(
    client: openai.OpenAI,
    kind: str,
    body: Mapping[str, Any],
    status: int,
    param: str | None,
    code: str | None,
) -> None:
    """At once, with the field, and as a status before any stream begins."""
    path = "/chat/completions" if kind == "chat" else "/completions"
    whole = {"model": MODEL, "stream": True, **({"messages": CHAT} if kind == "chat" else {})}
    with pytest.raises(openai.APIStatusError) as refused:
        client.post(path, body={**whole, **body}, cast_to=object)
    error = refused.value
    assert error.status_code == status, error.message
    assert error.body["message"]
    assert error.type == "invalid_request_error"
    assert error.param == (param if param != "base_model" else "model")
    assert code is None or error.code == code


def test_what_is_not_served_is_said_in_openais_form_too(client: openai.OpenAI) -> None:
    for ask, path in (
        (client.post, "/embeddings"),
        (client.put, "/models"),
        (client.get, "/chat/completions"),
        (client.delete, "/models/a"),
        (client.get, "/models/absent"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(path, cast_to=object)
        assert refused.value.body["message"]


def test_what_changes_nothing_is_taken_and_what_is_unknown_passed_over(
    client: openai.OpenAI,
) -> None:
    """So that programs that spell out every default run."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=2,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
        tools=[{"type": "function", "function": {"name": "f"}}],
        user="me",
        store=False,
        extra_body={"nobody_knows": [1], "seed": -1, "stop": None, "n": None},
    )
    assert answer.choices[0].message.content is not None
