"""Types own what they are given, and calls what they are called with.

The tests walk the public surface: a new type or method is covered by itself, or fails here until
`example` knows how to make its arguments.
"""

import asyncio
import collections.abc
import copy
import dataclasses
import datetime
import enum
import inspect
import pickle
import types as python_types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import types

PLAIN = (str, int, float, bool, type(None), datetime.datetime, Path)
TOKENS = [5, 6, 7]
IGNORED = (
    *("self", "return", "args", "kwargs", "retry_config"),
    "age_encryption_recipients",  # which is refused
    *("fn", "input_ranks"),  # of what is made at once
)
LEFT_OUT = (
    *("weights_access_token", "adam_params", "loss_type_input"),
    *("num_samples", "optimizer"),
)
"""Parameters that stay at their defaults: not supported, or another name of one that is given."""


def public_types() -> list[type]:
    """Every class in `types` that can be made."""
    found = [getattr(types, name) for name in types.__all__]
    kinds = {kind for kind in found if inspect.isclass(kind) and kind.__module__ != "builtins"}
    kinds = {kind for kind in kinds if not issubclass(kind, enum.Enum)}
    kinds.discard(types.LossHandle)  # holds a function, which is nobody's to copy
    return sorted(
        (k for k in kinds if "unsupported" not in k.__module__), key=lambda kind: kind.__name__
    )


def example(hint: Any, name: str, kind: Callable[[Any], Any] = list) -> Any:
    """A fresh argument for a parameter; sequences of numbers are made by `kind`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if name in ("tokens", "tokens_np", "logprobs", "logprobs_np", "token_ids"):
        return kind([float(t) for t in TOKENS] if "logprobs" in name else list(TOKENS))
    if name == "target_prompt_logprobs":
        return types.TensorData([[1, 2], [3, -1]])
    if name in ("prompt_logprobs_np",):
        return np.array(TOKENS, np.float32)
    if name == "loss_fn_inputs":
        return {"target_tokens": kind(list(TOKENS)), "weights": kind([1.0, 1.0, 1.0])}
    if name == "loss_fn_outputs":
        return [{"logprobs": np.array([1.0, 2.0], np.float32)}]
    if name == "stop":
        return [1, 2]
    if name == "loss_fn":
        return "ppo" if "Literal" in str(hint) else lambda data, logprobs: (logprobs[0].sum(), {})
    if name == "loss_fn_config":
        return {"clip_low_threshold": 0.7}
    if name in ("checkpoint_type", "type", "stop_reason", "kind", "access_scope"):
        return {"checkpoint_type": "training", "stop_reason": "stop", "kind": "snapshot"}.get(
            name, "adamw" if "adamw" in str(hint) else "encoded_text"
        )
    if origin in (typing.Union, python_types.UnionType):
        return example(next(arg for arg in args if arg is not type(None)), name, kind)
    if origin is Literal:
        return args[0]
    if origin in (list, collections.abc.Sequence):
        return [example(args[0], "", kind)]
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return {"key": "value" if args[1] is str else 0.5}
    plain: dict[Any, Any] = {str: "text", int: 1, float: 0.5, bool: True, Path: Path("folder")}
    if hint in plain:
        return plain[hint]
    if hint is datetime.datetime:
        return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    if hint is type(None):
        return None
    if inspect.isclass(hint) and hint in public_types():
        return make(hint, kind)
    raise AssertionError(f"tell this test how to make {name}: {hint}")


def arguments(function: Callable[..., Any], kind: Callable[[Any], Any]) -> dict[str, Any]:
    """An example of every parameter."""
    hints = typing.get_type_hints(function, vars(types))
    names = hints.keys() - {"return", *LEFT_OUT}
    return {name: example(hints[name], name, kind) for name in sorted(names)}


def make(cls: type, kind: Callable[[Any], Any] = list) -> Any:
    return cls(**constructor_arguments(cls, kind))


def constructor_arguments(cls: type, kind: Callable[[Any], Any]) -> dict[str, Any]:
    if cls is types.TensorData:
        return {"data": kind([1.0, 2.0, 3.0]), "shape": [3, 1]}
    hints = typing.get_type_hints(cls)
    return {
        field.name: example(hints[field.name], field.name, kind)
        for field in dataclasses.fields(cls)
        if not field.name.endswith("_spans")
    }


def mutate(value: Any) -> bool:
    """Change a value in place, and all that it is made of; True where that was possible."""
    if isinstance(value, np.ndarray):
        if value.flags.writeable:
            value[...] = 99
        return value.flags.writeable
    if type(value).__module__.startswith("torch"):
        value.fill_(99)
        return True
    if isinstance(value, list):
        any(list(map(mutate, value)))
        value.clear()
        return True
    if isinstance(value, dict):
        any(list(map(mutate, value.values())))
        value.clear()
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            mutate(getattr(value, field.name))
    return False


def torch_tensor(values: Any) -> Any:
    return pytest.importorskip("torch").tensor(values)


KINDS = {"list": list, "numpy": np.array, "torch": torch_tensor}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", public_types(), ids=lambda cls: cls.__name__)
def test_types_own_what_they_are_given(cls: type, kind: str) -> None:
    """Every argument of every type is changed after the type was made: it stays as it was."""
    given = constructor_arguments(cls, KINDS[kind])
    made = cls(**given)
    before = pickle.dumps(made)
    mutate(given)
    assert pickle.dumps(made) == before


def test_a_reused_buffer_is_not_a_tokens_sequence() -> None:
    """The loop of every RL recipe: one list that grows, is put into a chunk, and is emptied."""
    buffer = [1, 2, 3]
    chunk = tinsmith.types.EncodedTextChunk(tokens=buffer)
    prompt = tinsmith.ModelInput(chunks=[chunk])
    from_ints = tinsmith.ModelInput.from_ints(buffer)
    longer = prompt.append(tinsmith.types.EncodedTextChunk(tokens=buffer))
    buffer.clear()
    assert (prompt.length, prompt.to_ints()) == (3, [1, 2, 3])
    assert from_ints.to_ints() == [1, 2, 3]
    assert longer.to_ints() == [1, 2, 3, 1, 2, 3]


def test_memory_that_others_write_to_is_copied() -> None:
    """Whatever shares its memory with numpy without being an array."""
    memory = np.array([1, 2, 3], np.int64)
    tensor = tinsmith.TensorData(memoryview(memory))  # type: ignore[arg-type]
    memory[:] = 9
    assert tensor.tolist() == [1, 2, 3]


@pytest.mark.parametrize("cls", public_types(), ids=lambda cls: cls.__name__)
def test_values_with_arrays_compare_and_are_found(cls: type) -> None:
    """`==`, `!=`, `in` and `index` give a truth for every type, whatever it holds."""
    one, same = make(cls, np.array), make(cls, np.array)
    assert one == same
    assert (one != same) is False
    assert one in [0, same]
    assert [0, same].index(one) == 1
    assert one != 0
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one


def test_values_that_differ_are_not_equal() -> None:
    """In any array, NaN or not."""

    def response(value: float) -> types.SampleResponse:
        logprobs = np.array([np.nan, value], np.float32)
        sequence = types.SampledSequence("stop", "id", np.array([1]), np.array([-0.5]))
        return types.SampleResponse([sequence], logprobs)

    assert response(1.0) == response(1.0)
    assert response(1.0) != response(2.0)
    assert response(1.0) not in [response(2.0), response(3.0)]


# --- calls ----------------------------------------------------------------------------------------


CALLS = [
    *((tinsmith.TrainingClient, name) for name in (
        "forward", "forward_backward", "forward_backward_custom", "optim_step", "save_state",
        "save_weights_for_sampler", "load_state", "load_state_with_optimizer",
    )),
    *((tinsmith.SamplingClient, name) for name in ("sample", "sample_stream", "compute_logprobs")),
    *((tinsmith.ServiceClient, name) for name in (
        "create_lora_training_client", "create_full_training_client",
        "create_training_client_from_state", "create_training_client_from_state_with_optimizer",
    )),
]  # fmt: skip
"""Methods with an argument that can be changed, beside those of which the next test says so."""


def test_every_method_with_a_mutable_argument_is_tested() -> None:
    """A new one has to be named in CALLS."""
    for cls in (tinsmith.TrainingClient, tinsmith.SamplingClient, tinsmith.ServiceClient,
                tinsmith.RestClient):  # fmt: skip
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if name.startswith("_") or name.endswith("_async") or (cls, name) in CALLS:
                continue
            for parameter, hint in typing.get_type_hints(method).items():
                if parameter in IGNORED:
                    continue
                text = str(hint)
                mutable = any(
                    word in text
                    for word in ("list", "Sequence", "Mapping", "dict", "ModelInput", "Params")
                )
                assert not mutable, f"{cls.__name__}.{name}({parameter}: {text})"


@pytest.mark.parametrize("as_twin", [False, True], ids=["future", "async"])
@pytest.mark.parametrize(("cls", "name"), CALLS, ids=lambda part: getattr(part, "__name__", part))
def test_calls_own_what_they_are_called_with(
    peer: Peer, cls: type, name: str, as_twin: bool
) -> None:
    """Every argument is changed before anything is sent; what is sent is what was given."""
    if name == "forward_backward_custom":
        pytest.importorskip("torch")
    sent = []
    for changed in (False, True):
        messages = peer.servicer.recorded = []
        service = tinsmith.ServiceClient(base_url=peer.address)
        client: Any = {
            tinsmith.TrainingClient: lambda s=service: s.create_lora_training_client("b").result(
                10
            ),
            tinsmith.SamplingClient: lambda s=service: s.create_sampling_client(
                base_model="b"
            ).result(10),
            tinsmith.ServiceClient: lambda s=service: s,
        }[cls]()
        messages.clear()
        method = getattr(client, name)
        given = call_arguments(getattr(cls, name), np.array)
        twin = getattr(client, f"{name}_async", None)
        if as_twin and twin is None:
            pytest.skip("has no twin")
        result = twin(**given) if as_twin else method(**given)
        if changed:
            mutate(given)
        finish(result)
        sent.append(list(messages))
    assert sent[0], "nothing was sent"
    assert sent[0] == sent[1]


def call_arguments(method: Any, kind: Callable[[Any], Any]) -> dict[str, Any]:
    given = arguments(method, kind)
    if "sampling_params" in given:
        given["sampling_params"] = tinsmith.SamplingParams(max_tokens=4, seed=1, stop=[3])
    return given


def finish(result: Any) -> None:
    """Wait for whatever a method returned."""
    if inspect.iscoroutine(result):

        async def wait() -> None:
            value = await result
            if isinstance(value, tinsmith.APIFuture):
                await value

        asyncio.run(wait())
    elif isinstance(result, tinsmith.APIFuture):
        result.result(10)
    else:
        list(result)
