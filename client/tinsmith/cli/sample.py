"""`tinsmith sample`: a prompt from the shell, and what the model makes of it as it comes."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from tinsmith._connection import Connection
from tinsmith._tokenizer import fetch_tokenizer
from tinsmith._weights import Weights
from tinsmith.cli.command import Session, command
from tinsmith.cli.complete import checkpoint_paths
from tinsmith.cli.failures import USAGE, Failed
from tinsmith.cli.tokenizer import Tokenizer
from tinsmith.sampling_client import SamplingClient
from tinsmith.types import ModelInput, SamplingParams

CHARACTERS_MAX = 4_000_000
"""Longest prompt that is read from standard input."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "sample")(sample)


def sample(
    session: Session,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text; - reads standard input.")
    ],
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Weights to sample from; else the base model.",
            autocompletion=checkpoint_paths,
        ),
    ] = "",
    base_model: Annotated[
        str, typer.Option(metavar="NAME", help="Where the cluster has several.")
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message in the chat template.")
    ] = False,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="With --chat: the system message.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most new tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", min=0.0, max=1.0, help="Draw among those that reach it.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=-1, help="Draw among so many; -1 is all.")
    ] = -1,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same one, the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End at it; may be repeated.")
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", min=1, help="Samples.")] = 1,
) -> None:
    """Sample from a base model or a checkpoint.

    Tokens are shown as they come, and the same seed gives the same text. The tokenizer is the
    cluster's, and what reads it comes with tinsmith[client].
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    if system and not chat:
        raise Failed("--system is of a chat", "add --chat", USAGE)
    text = _read() if prompt == "-" else prompt
    with closing(_client(session, checkpoint, base_model)) as client:
        access = session.access
        files = access.run(fetch_tokenizer(access.connection, client.get_base_model()))
        tokenizer = Tokenizer(files)
        tokens = tokenizer.encode_chat(text, system) if chat else tokenizer.encode(text)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or None,
        )
        shown = not session.out.as_json and number == 1  # of several only whole ones can be read
        begun_s = time.monotonic()
        made = [
            Text(tokenizer, shown_by=session.out.pieces if shown else None) for _ in range(number)
        ]
        for new in client.sample_stream(ModelInput.from_ints(tokens), number, params):
            made[new.sequence_index].add(new.tokens, new.logprobs, new.stop_reason)
        _show(session, made, len(tokens), time.monotonic() - begun_s, shown)


def _show(
    session: Session, made: "Sequence[Text]", prompt_tokens: int, took_s: float, shown: bool
) -> None:
    count = sum(len(each.tokens) for each in made)
    if session.out.as_json:
        document = {"prompt_tokens": prompt_tokens, "seconds": round(took_s, 3)}
        session.out.json(document | {"samples": [each.record() for each in made]})
        return
    for index, each in enumerate(made if not shown else ()):
        session.out.line(f"--- {index + 1} of {len(made)}")
        session.out.pieces(each.text + "\n")
    if shown:
        session.out.pieces("\n")
    reasons = ", ".join(dict.fromkeys(each.stop_reason for each in made))
    rate = f"{count / took_s:.1f} tokens/s" if took_s else ""
    session.out.note(f"{prompt_tokens} + {count} tokens, {rate}, ended by {reasons}")


def _client(session: Session, checkpoint: str, base_model: str) -> SamplingClient:
    access = session.access
    if checkpoint:
        opened = SamplingClient.opened(access.connection, base_model, checkpoint)
        client: SamplingClient = access.wait(opened)
        return client
    name = access.run(_base_model(access.connection, base_model))
    return SamplingClient(access.connection, name, Weights(access.connection, None))


async def _base_model(connection: Connection, wanted: str) -> str:
    """The name that the cluster has for a base model; the only one where none is wanted.

    Raises:
        Failed: There are several.
    """
    if wanted:
        return await connection.base_model_name(wanted)
    names = [model.name for model in (await connection.capabilities()).base_models]
    if len(names) > 1:
        raise Failed(f"which of {', '.join(names)}?", "--base-model says it", USAGE)
    return names[0]


def _read() -> str:
    text = sys.stdin.read(CHARACTERS_MAX + 1)
    if len(text) > CHARACTERS_MAX:
        raise Failed(f"the prompt has more than {CHARACTERS_MAX:,} characters", "", USAGE)
    return text


@dataclass
class Text:
    """The text of one sequence, decoded as its tokens come.

    A character of several tokens is held back until it is whole. Only the newest tokens are decoded
    again, with those before them that say how they are spelled.

    Attributes:
        tokenizer: Decodes.
        shown_by: Given each new piece of the text; None shows nothing.
        tokens: All tokens.
        logprobs: Theirs.
        text: All text that is whole.
        stop_reason: `stop` or `length`; empty while it goes on.
    """

    tokenizer: Tokenizer
    shown_by: Any = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    stop_reason: str = ""
    _begin: int = 0  # of the tokens that are decoded again
    _end: int = 0  # of those whose text was given out

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[float], stop_reason: str | None
    ) -> None:
        """Take the next tokens in."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.stop_reason = stop_reason or self.stop_reason
        for piece in self._pieces(ended=stop_reason is not None):
            self.text += piece
            if self.shown_by is not None:
                self.shown_by(piece)

    def _pieces(self, *, ended: bool) -> Iterator[str]:
        known = self.tokenizer.decode(self.tokens[self._begin : self._end])
        found = self.tokenizer.decode(self.tokens[self._begin :])
        if found.endswith("\ufffd") and not ended:
            return
        self._begin, self._end = self._end, len(self.tokens)
        if len(found) > len(known):
            yield found[len(known) :]

    def record(self) -> dict[str, Any]:
        """As `--json` has it."""
        keys = ("text", "tokens", "logprobs", "stop_reason")
        return {key: getattr(self, key) for key in keys}
