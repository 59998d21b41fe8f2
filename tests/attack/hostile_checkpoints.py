"""Checkpoints that somebody made up: each is a good one with one thing changed.

The good one is of a rank-4 adapter for the tiny Llama of `tiny_models.py`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from checkpoints import to_files
from tinsmith.v1 import types_pb2
from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.state import files as state_files

RANK = 4
LORA = LoraConfig(rank=RANK)
STEPS = 3
STATE, CONFIG = state_files.STATE_FILE, state_files.PEFT_CONFIG_FILE
WEIGHTS, OPTIMIZER = state_files.WEIGHTS_FILE, state_files.OPTIMIZER_FILE
A_NAME = "base_model.model.lm_head.lora_A.weight"
B_NAME = "base_model.model.lm_head.lora_B.weight"

Files = dict[str, bytes]
Change = Callable[[Files], None]


def _shapes() -> dict[str, tuple[int, int]]:
    """Of PEFT's tensors, from (in, out) of each module."""
    sizes = {"lm_head": (32, 320)}
    for layer in range(2):
        where = f"model.layers.{layer}"
        for name, out in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            sizes[f"{where}.self_attn.{name}_proj"] = (32, out)
        for name, size in (("gate", (32, 48)), ("up", (32, 48)), ("down", (48, 32))):
            sizes[f"{where}.mlp.{name}_proj"] = size
    shapes = {}
    for module, (columns, rows) in sorted(sizes.items()):
        shapes[f"base_model.model.{module}.lora_A.weight"] = (RANK, columns)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, RANK)
    return shapes


def good_files(*, optimizer: bool = True) -> Files:
    """The files of the good one."""
    return dict(_good_files(optimizer))


@functools.cache
def _good_files(optimizer: bool) -> Files:
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=s).astype(np.float32) / 32 for n, s in _shapes().items()}
    moments = {
        f"{kind}.{n}": w**2 for n, w in weights.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    modules = sorted({name.split(".")[-3] for name in weights})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 32,
        "target_modules": modules,
        "inference_mode": True,
        "base_model_name_or_path": "tiny-llama",
    }
    state = ModelState(LORA, weights, moments if optimizer else {}, STEPS, config)
    return to_files(state)


@dataclass(frozen=True)
class Hostile:
    """One kind of hostile checkpoint.

    Attributes:
        change: Makes it of the good one's files.
        file: Which of its files is to blame.
        field: Where in that file.
        header: What its header says otherwise.
        too_large: It is refused before its last byte.
    """

    change: Change
    file: str = STATE
    field: str = ""
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    too_large: bool = False

    def files(self, *, optimizer: bool = True) -> Files:
        """Its files; without an optimizer's only where it is not about that."""
        found = good_files(optimizer=optimizer)
        self.change(found)
        return found

    @property
    def refused_field(self) -> str:
        """What the refusal of a write names."""
        if self.too_large:
            return "piece.data"
        separator = "." if self.field and not self.field.startswith("[") else ""
        return f'commit.files["{self.file}"]{separator}{self.field}'


# --- changes ----------------------------------------------------------------------------------


def _json(file: str, *path: str, value: Any) -> Change:
    """Sets, or with `...` takes away, what stands at a path."""

    def change(files: Files) -> None:
        whole = json.loads(files[file])
        inner = whole
        for name in path[:-1]:
            inner = inner[name]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        files[file] = json.dumps(whole).encode()

    return change


def _state(name: str, value: Any) -> Hostile:
    return Hostile(_json(STATE, name, value=value), STATE, name)


def _lora(name: str, value: Any) -> Hostile:
    return Hostile(_json(STATE, "lora", name, value=value), STATE, f"lora.{name}")


def _config(name: str, value: Any) -> Hostile:
    return Hostile(_json(CONFIG, name, value=value), CONFIG, name)


def _text(file: str, old: str, new: str) -> Hostile:
    """Changes a file's text, for what no JSON writer writes."""

    def change(files: Files) -> None:
        text = files[file].decode()
        assert old in text
        files[file] = text.replace(old, new, 1).encode()

    return Hostile(change, file)


def _bytes(file: str, content: bytes, *, too_large: bool = False) -> Hostile:
    def change(files: Files) -> None:
        files[file] = content

    return Hostile(change, file, too_large=too_large)


def _without(file: str) -> Hostile:
    def change(files: Files) -> None:
        del files[file]

    return Hostile(change, file)


def _header(edit: Callable[[dict[str, Any]], Any], file: str = WEIGHTS, field: str = "") -> Hostile:
    """Changes a safetensors header; what `edit` returns, if anything, takes its place."""

    def change(files: Files) -> None:
        data = files[file]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edited = edit(header)
        text = edited if isinstance(edited, bytes) else json.dumps(header).encode()
        files[file] = len(text).to_bytes(8, "little") + text + data[8 + length :]

    return Hostile(change, file, field)


def _about(name: str, key: str, value: Any) -> Hostile:
    """Changes what the header says of a tensor."""

    def edit(header: dict[str, Any]) -> None:
        header[name][key] = value

    return _header(edit, field=f'["{name}"]')


def _tensors(file: str, name: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Hostile:
    """Changes the tensors themselves; the file is a good one of its kind."""

    def change(files: Files) -> None:
        tensors = {key: array.copy() for key, array in load(files[file]).items()}
        edit(tensors)
        files[file] = save(tensors)

    return Hostile(change, file, f'["{name}"]')


def _value(file: str, name: str, value: float) -> Hostile:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[-1] = value

    return _tensors(file, name, edit)


def _pop(file: str, name: str) -> Hostile:
    return _tensors(file, name, lambda tensors: tensors.__delitem__(name))


def _add(file: str, name: str, array: np.ndarray) -> Hostile:
    return _tensors(file, name, lambda tensors: tensors.__setitem__(name, array))


def _huge_header(_: dict[str, Any]) -> bytes:
    one = b'"t%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % n for n in range(120_000)) + b"}"


def _many_tensors(_: dict[str, Any]) -> bytes:
    one = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % n for n in range(30_000)) + b"}"


def _overlap(header: dict[str, Any]) -> None:
    header[B_NAME]["data_offsets"] = [0, header[B_NAME]["data_offsets"][1] - 512]


def _rank_of_tensors(files: Files) -> None:
    """Everything but the tensors says rank 256, which is allowed."""
    _json(STATE, "lora", "rank", value=256)(files)
    _json(CONFIG, "r", value=256)(files)


def _moments_without_steps(files: Files) -> None:
    _json(STATE, "step_count", value=0)(files)


def _steps_without_moments(files: Files) -> None:
    del files[OPTIMIZER]
    _json(STATE, "has_optimizer", value=False)(files)


def _full(files: Files) -> None:
    _json(STATE, "lora", value=...)(files)
    _json(STATE, "full", value={})(files)


BOMB = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
FIRST_MOMENT, SECOND_MOMENT = f"exp_avg.{A_NAME}", f"exp_avg_sq.{A_NAME}"
SAID_RANK_256 = {"lora_config": types_pb2.LoraConfig(rank=256, seed=0)}

HOSTILE: dict[str, Hostile] = {
    # what model_state.json says
    "rank 60000": _lora("rank", 60_000),
    "rank 2^30": _lora("rank", 1 << 30),
    "rank as text": _lora("rank", "4"),
    "rank 0": _lora("rank", 0),
    "rank -4": _lora("rank", -4),
    "rank null": _lora("rank", None),
    "rank 4.0": _lora("rank", 4.0),
    "rank true": _lora("rank", True),
    "rank of another adapter": _lora("rank", 8),
    "rank that the header says too": Hostile(
        _rank_of_tensors, WEIGHTS, f'["{A_NAME}"]', header=SAID_RANK_256
    ),
    "alpha 0": _lora("alpha", 0),
    "alpha as text": _lora("alpha", "32"),
    "alpha of another adapter": _lora("alpha", 64.0),
    "alpha NaN": _text(STATE, '"alpha": 32.0', '"alpha": NaN'),
    "alpha infinite": _text(STATE, '"alpha": 32.0', '"alpha": 1e999'),
    "seed as text": _lora("seed", "x"),
    "seed beyond 64 bits": _lora("seed", 1 << 64),
    "switch as number": _lora("train_mlp", 1),
    "targets of another adapter": _lora("train_mlp", False),
    "unknown setting": Hostile(_json(STATE, "lora", "dropout", value=0.1), STATE, "lora"),
    "missing setting": _lora("alpha", ...),
    "steps 1e999": _text(STATE, f'"step_count": {STEPS}', '"step_count": 1e999'),
    "steps -5": _state("step_count", -5),
    "steps 2^63": _state("step_count", 1 << 63),
    "steps of 4,000 digits": _text(STATE, f'"step_count": {STEPS}', '"step_count": ' + "9" * 4000),
    "steps beyond a float": _state("step_count", 10**350),
    "steps as text": _state("step_count", "3"),
    "steps other than the header's": _state("step_count", STEPS + 1),
    "moments without steps": Hostile(_moments_without_steps, STATE, "step_count"),
    "steps without moments": Hostile(_steps_without_moments, STATE, "has_optimizer"),
    "moments that are not there": Hostile(lambda f: f.pop(OPTIMIZER), STATE, "has_optimizer"),
    "moments that are not said": _state("has_optimizer", False),
    "optimizer as text": _state("has_optimizer", "yes"),
    "format of tomorrow": _state("format_version", 2),
    "format as true": _state("format_version", True),
    "adapter as a list": _state("lora", []),
    "all weights, said to be an adapter": Hostile(_full, STATE, "full"),
    "a name twice": _text(STATE, '"step_count"', '"step_count": 3, "step_count"'),
    "state of nothing": _bytes(STATE, b"null"),
    "state as a list": _bytes(STATE, b"[]"),
    "state of brackets": _bytes(STATE, BOMB),
    "state of 20 MB": _bytes(STATE, b'{"x": "' + b"x" * 20_000_000 + b'"}', too_large=True),
    "state that is no UTF-8": _bytes(STATE, b"\xff\xfe{}"),
    # what adapter_config.json says
    "config of another rank": _config("r", 8),
    "config of absurd rank": _config("r", 1 << 40),
    "config of another alpha": _config("lora_alpha", 1),
    "config with a pattern": _config("target_modules", "(a+)+$"),
    "config with ranks by pattern": _config("rank_pattern", {"(a+)+$": 60_000}),
    "config with code": _config("auto_mapping", {"base_model_class": "os"}),
    "config with other weights": _config("modules_to_save", ["embed_tokens"]),
    "config of another method": _config("peft_type", "PROMPT_TUNING"),
    "config with DoRA": _config("use_dora", True),
    "config that changes the base": _config("init_lora_weights", "pissa"),
    "config with an unknown setting": _config("run_me", "rm -rf /"),
    "config of brackets": _bytes(CONFIG, BOMB),
    "config of 20 MB": _bytes(CONFIG, b'{"x": "' + b"x" * 20_000_000 + b'"}', too_large=True),
    "config as a list": _bytes(CONFIG, b"[]"),
    "config with a name twice": _text(CONFIG, '"r"', '"r": 4, "r"'),
    # safetensors headers
    "pickle": _bytes(WEIGHTS, b"\x80\x04cposix\nsystem\n" * 9),
    "four bytes": _bytes(WEIGHTS, b"\0" * 4),
    "header longer than the file": _bytes(WEIGHTS, (1 << 40).to_bytes(8, "little") + b"{}"),
    "header of 8 MB": _header(_huge_header),
    "30,000 tensors": _header(_many_tensors),
    "header of brackets": _header(lambda _: BOMB),
    "no tensors": _header(lambda _: b"{}"),
    "tensors that overlap": _header(_overlap, field=f'["{B_NAME}"]'),
    "offsets beyond the file": _about(A_NAME, "data_offsets", [0, 1 << 50]),
    "offsets backwards": _about(A_NAME, "data_offsets", [512, 0]),
    "offsets as text": _about(A_NAME, "data_offsets", ["0", "512"]),
    "offsets below 0": _about(A_NAME, "data_offsets", [-512, 0]),
    "unknown dtype": _about(A_NAME, "dtype", "F1"),
    "integers": _about(A_NAME, "dtype", "I32"),
    "dtype as number": _about(A_NAME, "dtype", 32),
    "shape [0, 2^62]": _about(A_NAME, "shape", [0, 1 << 62]),
    "shape of 2^20 dimensions": _about(A_NAME, "shape", [1] * (1 << 10)),
    "shape as text": _about(A_NAME, "shape", "4x32"),
    "shape turned": _about(A_NAME, "shape", [32, 4]),
    "shape of one dimension": _about(A_NAME, "shape", [128]),
    "bytes after the last tensor": Hostile(
        lambda files: files.__setitem__(WEIGHTS, files[WEIGHTS] + b"x" * 64), WEIGHTS
    ),
    "cut off": Hostile(lambda files: files.__setitem__(WEIGHTS, files[WEIGHTS][:-64]), WEIGHTS),
    # names and values
    "a tensor of another name": _add(WEIGHTS, "../../etc/passwd", np.ones((4, 4), np.float32)),
    "half of a pair": _pop(WEIGHTS, B_NAME),
    "A and B that do not fit": _add(WEIGHTS, A_NAME, np.ones((8, 32), np.float32)),
    "NaN weight": _value(WEIGHTS, B_NAME, np.nan),
    "infinite weight": _value(WEIGHTS, A_NAME, np.inf),
    "NaN moment": _value(OPTIMIZER, FIRST_MOMENT, np.nan),
    "second moment below 0": _value(OPTIMIZER, SECOND_MOMENT, -1.0),
    "infinite second moment": _value(OPTIMIZER, SECOND_MOMENT, np.inf),
    "missing moment": _pop(OPTIMIZER, SECOND_MOMENT),
    "moment of nothing": _add(OPTIMIZER, "exp_avg.x", np.ones((4, 4), np.float32)),
    "moment of another shape": _add(OPTIMIZER, FIRST_MOMENT, np.ones((4, 33), np.float32)),
    # files
    "no state": _without(STATE),
    "no config": _without(CONFIG),
    "no weights": _without(WEIGHTS),
}

ONLY_TRAINING = {
    *(kind for kind, hostile in HOSTILE.items() if hostile.file == OPTIMIZER),
    *("moments without steps", "steps without moments", "steps other than the header's"),
    *("moments that are not there", "moments that are not said"),
}
"""Kinds that are about the optimizer's state."""
