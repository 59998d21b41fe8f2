"""The recipes, how each is called, and what must come of it."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cookbook.folder import MODEL

Steps = Sequence[Mapping[str, Any]]
Check = Callable[[Steps, str], str]
"""Takes the rows of metrics.jsonl and what was printed; says what was found, or raises."""


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        run: Its arguments; the first is the module below `tinker_cookbook.recipes`, or a script of
            its tests.
        check: Of what it leaves.
        metrics: Where metrics.jsonl is, below the recipe's folder.
        killed_after: Kill it once metrics.jsonl has so many rows, and run it again; 0: do not.
    """

    run: Sequence[str]
    check: Check
    metrics: str = "log/metrics.jsonl"
    killed_after: int = 0


@dataclass(frozen=True)
class Values:
    """The values of one metric over the steps that have it."""

    name: str
    found: Sequence[float] = field(default_factory=tuple)

    def near(self, wanted: float, tolerance: float) -> str:
        """Says the first one; it must be as wanted."""
        assert self.found, f"no step has {self.name}"
        assert abs(self.found[0] - wanted) <= tolerance, f"{self.name} is {self.found[0]}"
        return f"{self.name} is {wanted:.6f} {self.found[0] - wanted:+.1e} at step 0"

    def falls(self) -> str:
        """Says the first and the last; that must be smaller."""
        assert len(self.found) > 1, f"{self.name}: {self.found}"
        assert self.found[-1] < self.found[0], f"{self.name}: {self.found}"
        return f"{self.name} {self.found[0]:.3f} -> {self.found[-1]:.3f}"


def values(steps: Steps, name: str) -> Values:
    """One metric."""
    return Values(name, [float(step[name]) for step in steps if name in step])


def read_metrics(file: Path) -> Steps:
    """Rows of metrics.jsonl that are whole; none where there is no such file."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def _learns(steps: Steps, _: str) -> str:
    return values(steps, "train_mean_nll").falls()


def _resumes(steps: Steps, printed: str) -> str:
    """Killed and run again, it goes on from its last rolling checkpoint to the end."""
    resumed = re.search(r"Resumed training from \S+/weights/0*(\d+)", printed)
    assert resumed, "nothing says that it resumed from a rolling checkpoint"
    numbers = [int(step["step"]) for step in steps if "train_mean_nll" in step]
    assert sorted(set(numbers)) == list(range(12)), f"steps {numbers}"
    return f"killed, resumed at step {int(resumed[1])}, {_learns(steps, '')}"


def _on_policy(steps: Steps, _: str) -> str:
    """What was sampled is what is trained: the two servers agree on every token."""
    values(steps, "optim/kl_sample_train_v2").near(0.0, 1e-8)
    return values(steps, "optim/kl_sample_train_v1").near(0.0, 1e-4)


def _trains(steps: Steps, _: str) -> str:
    found = values(steps, "optim/kl_sample_train_v2")
    assert found.found, "no step was trained"
    assert all(map(math.isfinite, found.found)), str(found.found)
    return f"{len(found.found)} steps, {found.name} at most {max(found.found):.1e}"


def _scales(_: Steps, printed: str) -> str:
    """The script's own tables, whose last columns are the mean and the largest difference."""
    rows = re.findall(r"^ +[\d.]+ +\d+ +\d+ +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert len(rows) == 7, f"{len(rows)} rows"
    worst = max(float(largest) for _, largest in rows)
    assert worst < 1e-3, f"differences up to {worst}"
    return f"logprobs at 6 temperatures, and of a sequence, differ by at most {worst:.6f}"


_MODEL = f"model_name={MODEL}"
_PLAIN = (_MODEL, "renderer_name=role_colon", "behavior_if_log_dir_exists=delete", "log_path=log")
_MATH = (
    *("math_rl.train", *_PLAIN, "group_size=4", "groups_per_batch=8", "max_tokens=4"),
    *("max_steps=3", "learning_rate=1e-4", "eval_every=0", "save_every=2"),
)
_CHAT = (
    *("chat_sl.train", _MODEL, "dataset=../chats.jsonl", "renderer_name=role_colon"),
    *("log_path=log", "batch_size=8", "max_length=512", "learning_rate=1e-3"),
    *("behavior_if_log_dir_exists=resume", "eval_every=0", "save_every=0"),
    *("rolling_save_every=1", "num_epochs=2"),
)
"""48 examples, twice: 12 steps."""


def _math(check: Check, *more: str) -> Recipe:
    return Recipe((*_MATH, *more), check)


RECIPES: Mapping[str, Recipe] = {
    "sl_loop": Recipe(
        (
            *("sl_loop", _MODEL, "log_path=log", "batch_size=8", "max_steps=4"),
            *("max_length=512", "learning_rate=1e-3", "save_every=2"),
        ),
        _learns,
    ),
    "chat_sl": Recipe(_CHAT, _resumes, killed_after=4),
    "math_rl": _math(_on_policy, "loss_fn=importance_sampling"),
    "math_rl_ppo": _math(_on_policy, "loss_fn=ppo", "num_substeps=2"),
    "math_rl_cispo": _math(_on_policy, "loss_fn=cispo"),
    "math_rl_async": _math(_trains, "loss_fn=importance_sampling", "max_steps_off_policy=2"),
    "math_rl_stream": _math(
        _trains,
        *("loss_fn=importance_sampling", "stream_minibatch_config.groups_per_batch=8"),
        "stream_minibatch_config.num_minibatches=2",
    ),
    "guess_number": Recipe(
        (
            *("multiplayer_rl.guess_number.train", *_PLAIN, "group_size=4", "batch_size=2"),
            *("max_tokens=8", "max_steps=2", "eval_every=0", "save_every=0"),
        ),
        _on_policy,
    ),
    "shorter": Recipe(
        (
            *("preference.shorter.train", *_PLAIN, "batch_size=8", "group_size=8"),
            *("max_tokens=64", "max_steps=20", "eval_every=0", "learning_rate=2e-2"),
        ),
        lambda steps, _: values(steps, "env/all/ac_tokens_per_turn").falls(),
    ),
    "dpo": Recipe(
        (
            *("preference.dpo.train", *_PLAIN, "batch_size=8", "max_steps=3"),
            *("learning_rate=1e-4", "max_length=1024"),
        ),
        lambda steps, _: values(steps, "dpo_loss").near(math.log(2), 1e-4),
    ),
    "distillation": Recipe(
        (
            *("distillation.on_policy_distillation", *_PLAIN, f"teacher_model={MODEL}"),
            *("group_size=2", "groups_per_batch=4", "max_tokens=16", "max_steps=2"),
            *("lora_rank=8", "eval_every=0", "save_every=0"),
        ),
        lambda steps, _: values(steps, "teacher_kl").near(0.0, 1e-4),
    ),
    "sdft": Recipe(
        (
            *("sdft.train", *_PLAIN, "groups_per_batch=4", "max_tokens=16", "max_steps=2"),
            *("lora_rank=8", "topk=8", "eval_every=0", "save_every=0"),
            "max_context_length=2048",
        ),
        lambda steps, _: f"{len(steps)} steps" if steps else _none(),
    ),
    "rlhf": Recipe(
        (
            *("preference.rlhf.rlhf_pipeline", f"base_model={MODEL}", "short_name=tiny"),
            *("batch_size=4", "max_steps=2", "max_length=1024", "rl_max_tokens=16"),
            *("save_every=0", "eval_every=0", "lora_rank=8"),
        ),
        _on_policy,
        "runs/rlhf-tiny/rl/metrics.jsonl",
    ),
    "temperature": Recipe(
        ("tests/validate_temperature_logprobs.py", f"base_model={MODEL}"), _scales
    ),
}
"""By name. Numbers are small, so that all of them take minutes on two cores."""


def _none() -> str:
    raise AssertionError("no step was made")
