"""The text of a completion, and the strings that end it."""

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from tinsmithd.domain import SamplingParams, StopReason
from tinsmithd.sampler.engines.stopping import StopCheck
from tokenizers_for_tests import llama2_tokenizer

LLAMA2 = llama2_tokenizer()
BYTES = {byte: LLAMA2.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}


class Counted:
    """Decodes with a tokenizer, and counts the tokens that it was given."""

    def __init__(self, tokenizer: Tokenizer = LLAMA2) -> None:
        self._tokenizer = tokenizer
        self.count = 0

    def __call__(self, tokens: Sequence[int]) -> str:
        self.count += len(tokens)
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def ids(*pieces: str) -> list[int]:
    found = [LLAMA2.token_to_id(piece) for piece in pieces]
    assert None not in found
    return found


def stops_at(
    strings: Sequence[str], prompt: Sequence[int], new: Sequence[int], decode: Counted | None = None
) -> int | None:
    """After how many new tokens a stop string ends the sequence."""
    params = SamplingParams(max_tokens=1 << 30, stop_strings=tuple(strings), stop_at_eos=False)
    check = StopCheck(params, [], decode or Counted(), prompt)
    for count, token in enumerate(new, 1):
        if check.add(token) is StopReason.STOP:
            return count
    return None


def stops_at_by_rule(
    strings: Sequence[str], prompt: Sequence[int], new: Sequence[int]
) -> int | None:
    """The rule, word for word, for prompts that end with a whole character."""
    decode = Counted()
    before = decode(prompt)
    for count in range(1, len(new) + 1):
        whole = decode([*prompt, *new[:count]])
        if whole.endswith("\ufffd"):
            continue  # an unfinished character spoils those before it, which were looked at
        assert whole.startswith(before)
        if any(string in whole[len(before) :] for string in strings):
            return count
    return None


def test_text_of_a_completion_is_what_it_adds_to_the_prompt() -> None:
    """A stop string that begins with a space is found at the start of a completion, where a text
    of its own would have no space; one that reaches back into the prompt is not."""
    prompt = ids("<s>", "▁Hello", "▁world", ".")
    assert LLAMA2.decode(ids("▁Stop")) == "Stop"  # that is what makes it hard
    assert stops_at([" Stop"], prompt, ids("▁Stop", "▁a")) == 1
    assert stops_at([" Stop"], ids("<s>"), ids("▁Stop")) == 1
    assert stops_at([" Stop"], prompt, ids("▁a", "▁Stop")) == 2
    assert stops_at([" Stop"], prompt, ids("▁a", "Stop", "▁b")) is None
    assert stops_at(["  Stop"], prompt, ids("▁", "▁Stop")) == 2
    assert stops_at([". a"], prompt, ids("▁a", "▁b")) is None
    assert stops_at(["Stop"], [], ids("▁Stop")) == 1


def test_stop_strings_are_found_as_in_the_whole_text() -> None:
    """At random, with characters of several bytes, one by one."""
    rng = random.Random(0)
    units = [[token] for token in range(259, LLAMA2.get_vocab_size())]
    units += [[BYTES[byte] for byte in text.encode()] for text in "é€😀\n"]
    for _ in range(400):
        prompt = [token for unit in rng.choices(units, k=rng.randrange(1, 40)) for token in unit]
        new = [token for unit in rng.choices(units, k=12) for token in unit]
        text = LLAMA2.decode(prompt + new)[len(LLAMA2.decode(prompt)) :]
        start = rng.randrange(len(text))
        strings = [text[start : start + rng.randrange(1, 6)], "never"]
        assert stops_at(strings, prompt, new) == stops_at_by_rule(strings, prompt, new), strings


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_begun_in_the_prompt_is_the_completions(cut: int) -> None:
    """Its last bytes are what makes it one."""
    emoji = [BYTES[byte] for byte in "😀".encode()]
    prompt = [*ids("▁a"), *emoji, *emoji[:cut]]
    new = [*emoji[cut:], *ids("▁b")]
    assert stops_at(["😀"], prompt, new) == 4 - cut
    assert stops_at(["😀😀"], prompt, new) is None


def test_bytes_that_are_no_character_hold_nothing_back() -> None:
    """Nor do tokens without any text, or a prompt of nothing else."""
    nothing = [5_000] * 20
    noise = [BYTES[0xFF]] * 50
    assert stops_at([" Stop"], nothing, [*noise, *nothing, *ids("▁a", "▁Stop")]) == 72
    assert stops_at(["\ufffd"], ids("▁a"), noise) is not None


@pytest.mark.parametrize("kind", ["words", "characters of four bytes", "no characters", "nothing"])
def test_following_a_completion_costs_the_same_for_each_new_token(kind: str) -> None:
    """Tokens that are decoded, per new token, however long prompt and completion are."""
    unit = {
        "words": ids("▁a", "▁b", "c"),
        "characters of four bytes": [BYTES[byte] for byte in "😀".encode()],
        "no characters": [BYTES[0xFF]],
        "nothing": [5_000],
    }[kind]
    counts = []
    for new_count in (1_000, 4_000):
        decode = Counted()
        prompt = (unit * 50_000)[:50_000]
        assert stops_at(["never"], prompt, (unit * new_count)[:new_count], decode) is None
        counts.append(decode.count / new_count)
    assert counts[1] <= counts[0]
    assert counts[1] < 25
