"""Chat templates: written by who made a model, given what a caller wrote, and bounded.

They are rendered as transformers does it, with the names that it gives them, but without it: it
would bring all of itself into a process that only writes text.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

RENDER_S_MAX = 5.0
"""Longest time that a template may take."""
CLOCK = "tinsmith_clock"
"""Name of what each round of a loop, and each call of a macro, calls."""


class TemplateProblem(Exception):
    """What a template was given does not suit it; the message is for the caller."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what a model says, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Read the block, and leave what it has in it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateProblem(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what HTML needs escaped.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.Environment:
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _strftime_now
    return found


def _clocked(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """A template that looks at the clock wherever it could go on for ever."""
    repeated = (jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)
    found: list[Any] = list(tree.find_all(repeated))
    for node in found:
        name = jinja2.nodes.Name(CLOCK, "load")
        look = jinja2.nodes.ExprStmt(jinja2.nodes.Call(name, [], [], None, None))
        node.body.insert(0, look.set_lineno(node.lineno))
    return tree


def _clock(end_s: float) -> Callable[[], None]:
    def look() -> None:
        if time.monotonic() > end_s:
            raise TemplateProblem("the model's chat template takes too long with this chat")

    return look


class ChatTemplate:
    """One template.

    Args:
        source: Its text.
        special: The tokenizer's special tokens by their names, such as `bos_token`.

    Raises:
        TemplateProblem: It cannot be read.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(tree)
            self._template = environment.from_string(_clocked(tree))
        except jinja2.TemplateError as error:
            raise TemplateProblem(f"the model's chat template cannot be read: {error}") from None
        self._special = special

    @property
    def takes_tools(self) -> bool:
        """Whether it writes tools into a prompt."""
        return "tools" in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
        characters_max: int,
    ) -> str:
        """The prompt of a chat, up to where the model is to speak.

        Args:
            messages: What was said.
            tools: What the model may call.
            arguments: More variables; those that the template does not know are passed over.
            characters_max: A longer prompt is refused.

        Raises:
            TemplateProblem: The template refuses the messages, or takes too long.
        """
        look = _clock(time.monotonic() + RENDER_S_MAX)
        variables = {
            **{k: v for k, v in arguments.items() if k in self._variables},
            **self._special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            CLOCK: look,
        }
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > characters_max:
                    raise TemplateProblem(f"the chat has more than {characters_max} characters")
                look()
                parts.append(part)
        except TemplateProblem:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TemplateProblem(f"the model's chat template refuses it: {error}") from None
        except (AttributeError, RecursionError, MemoryError) as error:
            raise TemplateProblem(f"the model's chat template fails: {error}") from None
        return "".join(parts)
