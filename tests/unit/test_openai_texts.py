"""What OpenAI's clients read and write as text: stop strings, tokens, chat templates."""

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tinsmithd.completion_text import CompletionText
from tinsmithd.gateway.openai import templates
from tinsmithd.gateway.openai.cut import Cut
from tinsmithd.gateway.openai.templates import ChatTemplate, TemplateProblem
from tinsmithd.gateway.openai.tokenizer import Tokenizer
from tinsmithd.gateway.problems import Problem
from tokenizers_for_tests import llama2_tokenizer


def cut(pieces: Sequence[str], strings: Sequence[str]) -> tuple[str, bool]:
    following = Cut(strings)
    out = "".join(map(following.add, pieces))
    return out + following.rest(), following.stopped


@pytest.mark.parametrize(
    ("pieces", "strings", "out"),
    [
        (["a", "b", "c"], [], "abc"),
        (["one", " two", " three"], ["two"], "one "),
        (["one t", "w", "o three"], ["two"], "one "),
        (["one t", "w", "ice"], ["two"], "one twice"),
        (["aaab"], ["aab"], "a"),
        (["abc"], ["c", "bc"], "a"),
        (["xEN"], ["END"], "xEN"),
        (["", "\n", "\n", "x"], ["\n\n"], ""),
    ],
)
def test_a_text_ends_where_a_stop_string_begins(
    pieces: list[str], strings: list[str], out: str
) -> None:
    assert cut(pieces, strings) == (out, out != "".join(pieces))


def test_where_a_text_is_cut_does_not_depend_on_its_pieces() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        text = "".join(chance.choices("ab", k=30))
        strings = ["".join(chance.choices("ab", k=chance.randint(1, 6))) for _ in range(3)]
        ends = [text.find(s) + len(s) for s in strings if s in text]
        first = min(ends, default=None)
        wanted = text
        if first is not None:
            ending = max(len(s) for s in strings if text[:first].endswith(s))
            wanted = text[: first - ending]
        places = sorted(chance.choices(range(len(text)), k=4))
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert cut(pieces, strings) == (wanted, first is not None)


def test_nothing_is_given_out_that_a_stop_string_takes_back() -> None:
    following = Cut(["STOP"])
    assert [following.add(char) for char in "aSTxSTOPb"] == ["a", "", "", "STx", "", "", "", "", ""]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<eos>"])
    return Tokenizer({"tokenizer.json": rust.to_str().encode()})


TEXT = "Füße, 🫖 – 水"


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), Tokenizer({"tokenizer.json": llama2_tokenizer().to_str().encode()})],
    ids=["byte level", "byte fallback"],
)
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT, begins=False)
    data = b"".join(tokenizer.piece(token)[1] or b"" for token in tokens)
    assert data.decode().strip() == TEXT
    assert len(tokens) > len(TEXT), "characters are spread over tokens"


def test_a_stream_of_tokens_never_splits_a_character() -> None:
    tokenizer = byte_level()
    text = CompletionText(tokenizer.decode, ())
    pieces = [text.add(token) for token in tokenizer.encode(TEXT, begins=False)]
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    unfinished = CompletionText(tokenizer.decode, ())
    pieces = [unfinished.add(token) for token in tokenizer.encode("a🫖", begins=False)[:-1]]
    assert ("".join(pieces), unfinished.rest()) == ("a", "\ufffd")


def test_special_tokens_have_no_text_and_strange_ones_a_number() -> None:
    tokenizer = byte_level()
    eos = 256
    assert tokenizer.decode([eos]) == ""
    assert tokenizer.piece(eos) == ("<eos>", b"<eos>")
    assert tokenizer.piece(300) == ("token_id:300", None)


def test_a_tokenizer_that_cannot_be_read_is_a_problem_and_no_fault() -> None:
    for files in ({}, {"tokenizer.json": b"{}"}, {"tokenizer.json": b"\xff"}):
        with pytest.raises(Problem) as refused:
            Tokenizer(files)
        assert refused.value.status == 501


MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Größe <b>&</b> 'x'?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"ß": [1]}}}],
    },
    {"role": "tool", "content": "4", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "spaces": "{{ bos_token }}\n{%- for m in messages %}\n    {% if m.role == 'user' %}\n"
    "  {{- m.content | trim }}\n    {% endif %}\n{%- endfor %}\n",
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% endfor %}",
    "loops": "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if m.role == 'tool' %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}"
    "{{ ns.n ~ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "thinking": "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{{ unknown is defined }}{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_renders_them(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = {"enable_thinking": False}
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(TEMPLATES[name], special).render(MESSAGES, TOOLS, arguments, 10_000)
    theirs, _ = render_jinja_template(
        conversations=[MESSAGES],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **special,
        **arguments,
    )
    assert ours == theirs[0]


def test_what_a_caller_writes_is_no_template_and_takes_no_name_of_ours() -> None:
    template = ChatTemplate(TEMPLATES["chatml"], {})
    text = "{{ 1 + 1 }}{% for i in range(9) %}"
    hostile = {"messages": [], "raise_exception": 1, "range": 2}
    out = template.render([{"role": "user", "content": text}], None, hostile, 1000)
    assert out == f"<|user|>{text}\n<|assistant|>"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "refuses it"),
        ("{{ messages[9].content }}", "refuses it"),
        ("{{ ''.__class__.__mro__ }}", "refuses it"),
        ("{{ messages.append(1) }}", "refuses it"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails"),
    ],
)
def test_a_template_that_fails_refuses_the_messages(source: str, why: str) -> None:
    with pytest.raises(TemplateProblem, match=why):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x" * 99}], None, {}, 10_000)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ '' }}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{% set x = m(n - 1) ~ m(n - 1) %}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it writes anything meanwhile."""
    monkeypatch.setattr(templates, "RENDER_S_MAX", 0.05)
    with pytest.raises(TemplateProblem, match="too long"):
        ChatTemplate(source, {}).render([], None, {}, 10_000)


def test_a_template_that_cannot_be_read_is_a_problem() -> None:
    with pytest.raises(TemplateProblem, match="cannot be read"):
        ChatTemplate("{% for %}", {})


def test_the_template_for_tools_is_taken_where_there_are_several() -> None:
    config = b"""{"bos_token": {"content": "<s>"}, "chat_template": [
        {"name": "default", "template": "{{ bos_token }}plain"},
        {"name": "tool_use", "template": "{{ tools | length }}"}]}"""
    rust = llama2_tokenizer().to_str().encode()
    tokenizer = Tokenizer({"tokenizer.json": rust, "tokenizer_config.json": config})
    assert tokenizer.template(tools=False).render([], None, {}, 99) == "<s>plain"
    assert tokenizer.template(tools=True).render([], TOOLS, {}, 99) == "1"
    plain = Tokenizer({"tokenizer.json": rust, "chat_template.jinja": b"x"})
    with pytest.raises(Problem, match="takes none"):
        plain.template(tools=True)
    with pytest.raises(Problem, match="no chat template"):
        Tokenizer({"tokenizer.json": rust}).template(tools=False)
