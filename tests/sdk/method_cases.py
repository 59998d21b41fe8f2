"""How each public method of the stock SDK's clients is called, and what its answer must be."""

import inspect
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

if "SDK_TORCH" in os.environ:  # custom losses need torch, which an SDK looks for as it is imported
    sys.path.append(os.environ["SDK_TORCH"])

import tinker
from tinker import types

BASE_MODEL = os.environ.get("SDK_BASE_MODEL", "tiny-llama")
PROJECT = "default"
DAY = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
TOKENS = [5, 12, 19, 26, 33, 40]


def now(made: Any) -> Any:
    """A client: newer SDKs give a future of it."""
    return made.result() if hasattr(made, "result") else made


def batch() -> list[types.Datum]:
    """Data of a call."""
    inputs: dict[str, Any] = {"target_tokens": TOKENS[1:], "weights": [1.0] * 5}
    prompt = types.ModelInput.from_ints(TOKENS[:-1])
    return [types.Datum(model_input=prompt, loss_fn_inputs=inputs)]


class World:
    """What the calls are made on, and with.

    Attributes:
        service: A client of the service.
        training: A model, one step old.
        sampler: A sampler of the base model.
        rest: A client of what is stored.
        run: The model's id.
        state: The path of a training checkpoint.
        weights: The path of weights for sampling.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.service: Any = tinker.ServiceClient(project_id=PROJECT)
        self.training: Any = now(self.service.create_lora_training_client(BASE_MODEL, rank=4))
        self.training.forward_backward(batch(), "cross_entropy").result()
        self.training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        self.run: str = self.training.model_id
        self.session = self.run.partition(":")[0]
        self.state = self.saved()
        self.weights: str = self.training.save_weights_for_sampler(self.name()).result().path
        self.sampler: Any = now(self.service.create_sampling_client(base_model=BASE_MODEL))
        self.rest: Any = self.service.create_rest_client()

    def name(self) -> str:
        """A name that nothing has yet."""
        return f"n{next(self._numbers)}"

    def saved(self) -> str:
        """A training checkpoint that nobody else looks at."""
        return str(self.training.save_state(self.name()).result().path)

    def exported(self) -> str:
        """External weights."""
        return str(self.training.save_weights_external(self.name()).result().path)

    def kept(self, path: str) -> Any:
        """A checkpoint of the run as it is listed; None where it is not."""
        found = self.rest.list_checkpoints(self.run).result().checkpoints
        return next((each for each in found if each.tinker_path == path), None)


OWNERS: dict[str, Callable[[World], Any]] = {
    "ServiceClient": lambda world: world.service,
    "TrainingClient": lambda world: world.training,
    "SamplingClient": lambda world: world.sampler,
    "RestClient": lambda world: world.rest,
    "AdminClient": lambda _: tinker.AdminClient(),
}


@dataclass(frozen=True)
class Given:
    """Arguments of one call."""

    args: Sequence[Any]
    named: dict[str, Any]


def given(*args: Any, **named: Any) -> Given:
    """Arguments."""
    return Given(args, named)


@dataclass(frozen=True)
class Case:
    """How a method is called.

    Attributes:
        arguments: What with.
        holds: Whether the answer is right: the answer, the world, and what it was called with.
        of: On what, where that is not the world's own client of its class.
        refused: What the sentence has by which it is refused, any of these; none where it works.
    """

    arguments: Callable[[World], Given] = lambda _: given()
    holds: Callable[[Any, World, Given], bool] = lambda value, *_: value is not None
    of: Callable[[World], Any] | None = None
    refused: Sequence[str] = ()


def on_state(world: World) -> Given:
    return given(world.state)


def on_new_state(world: World) -> Given:
    return given(world.saved())


def new_name(world: World) -> Given:
    return given(world.name())


def named_so(kind: str) -> Callable[[Any, World, Given], bool]:
    """Whether an answer has the path that belongs to the name that was given."""
    return lambda value, world, gave: value.path == f"tinker://{world.run}/{kind}/{gave.args[0]}"


def loss_of(value: Any) -> float:
    return float(value.metrics["loss:sum"])


def custom_loss(_: Any, logprobs: Any) -> Any:
    total = -sum(each.sum() for each in logprobs)
    return total, {"nats": float(total)}


def traced_loss(logprobs, weights):  # type: ignore[no-untyped-def]  # its names are what is traced
    return -(logprobs * weights).sum(), {}


def trains_with(handle: Any, world: World, _: Given) -> bool:
    """Whether a handle of a loss gives what the same loss by its name gives."""
    custom = world.training.forward_backward_custom(batch(), handle).result()
    named = world.training.forward_backward(batch(), "cross_entropy").result()
    return abs(loss_of(custom) - loss_of(named)) < 1e-4


def samples(value: Any, *_: Any) -> bool:
    """Whether a sampler draws tokens."""
    prompt, params = types.ModelInput.from_ints(TOKENS), types.SamplingParams(max_tokens=2, seed=1)
    return len(now(value).sample(prompt, 1, params).result().sequences[0].tokens) > 0


def trains(value: Any, *_: Any) -> bool:
    """Whether a model computes."""
    return loss_of(value.forward(batch(), "cross_entropy").result()) > 0


def is_url(value: Any, *_: Any) -> bool:
    return bool(value.startswith("http"))


def gone(_: Any, world: World, gave: Given) -> bool:
    return world.kept(gave.args[0]) is None


def queue_state(_: World) -> Given:
    parameters = inspect.signature(tinker.SamplingClient.on_queue_state_change).parameters
    modules = [each for name, each in sys.modules.items() if name.startswith("tinker.")]
    kind: Any = next(each.QueueState for each in modules if hasattr(each, "QueueState"))
    return given(next(iter(kind)), *(["because"] if len(parameters) > 2 else []))


def is_any(*_: Any) -> bool:
    return True


# The twin of SDKs before AdminClient does not find their own event loop.
AUDIT, BILLED = ("no audit log", "incorrect event loop"), ("nothing is billed",)
SERVICE = {
    "create_lora_training_client": Case(lambda _: given(BASE_MODEL, rank=4), trains),
    "create_training_client_from_state": Case(on_state, trains),
    "create_training_client_from_state_with_optimizer": Case(on_state, trains),
    "create_sampling_client": Case(lambda w: given(model_path=w.weights), samples),
    "create_custom_loss": Case(
        lambda _: given(traced_loss, {"logprobs": 1, "weights": 1}), trains_with
    ),
    "copy_weights": Case(on_state, lambda path, w, _: path.startswith("tinker://")),
    "create_rest_client": Case(
        holds=lambda rest, w, _: bool(rest.list_checkpoints(w.run).result().checkpoints)
    ),
    "get_server_capabilities": Case(
        holds=lambda found, *_: BASE_MODEL in [each.model_name for each in found.supported_models]
    ),
    "get_console_url": Case(holds=is_url),
    "close": Case(lambda _: given("success"), is_any, of=lambda _: tinker.ServiceClient()),
    "get_telemetry": Case(holds=is_any),
}
TRAINING = {
    "forward": Case(lambda _: given(batch(), "cross_entropy"), lambda v, *_: loss_of(v) > 0),
    "forward_backward": Case(
        lambda _: given(batch(), "cross_entropy"), lambda v, *_: loss_of(v) > 0
    ),
    "forward_backward_custom": Case(
        lambda _: given(batch(), custom_loss), lambda v, *_: v.metrics["nats"] > 0
    ),
    "optim_step": Case(lambda _: given(types.AdamParams(learning_rate=1e-4))),
    "save_state": Case(new_name, named_so("weights")),
    "load_state": Case(on_state),
    "load_state_with_optimizer": Case(on_state),
    "save_weights_for_sampler": Case(new_name, named_so("sampler_weights")),
    "save_weights_external": Case(new_name, named_so("external_weights")),
    "save_weights_and_get_sampling_client": Case(holds=samples),
    "save_weights_and_get_sampling_client_submit": Case(),
    "create_sampling_client": Case(lambda w: given(w.weights), samples),
    "get_info": Case(holds=lambda info, w, _: (info.model_id, info.lora_rank) == (w.run, 4)),
    "get_tokenizer": Case(holds=lambda found, *_: bool(found.encode("the cat"))),
    "get_console_url": Case(holds=is_url),
    "get_telemetry": Case(holds=is_any),
}
SAMPLING = {
    "sample": Case(
        lambda _: given(
            types.ModelInput.from_ints(TOKENS), 2, types.SamplingParams(max_tokens=3, seed=1)
        ),
        lambda found, *_: len(found.sequences) == 2,
    ),
    "compute_logprobs": Case(
        lambda _: given(types.ModelInput.from_ints(TOKENS)),
        lambda found, *_: found[0] is None and len(found) == len(TOKENS),
    ),
    "get_tokenizer": TRAINING["get_tokenizer"],
    "get_base_model": Case(holds=lambda name, *_: name == BASE_MODEL),
    "get_sampler_handle": Case(
        holds=lambda handle, *_: samples(tinker.SamplingClient.from_sampler_handle(handle))
    ),
    "from_sampler_handle": Case(lambda w: given(w.sampler.get_sampler_handle()), samples),
    "create": Case(lambda w: given(w.service.holder, base_model=BASE_MODEL), samples),
    "on_queue_state_change": Case(queue_state, is_any),
    "get_telemetry": Case(holds=is_any),
}
ADMIN = {
    "get_audit_log": Case(refused=AUDIT),
    "get_billing_usage": Case(lambda _: given(*DAY), refused=BILLED),
    "get_current_checkpoint_storage_usage": Case(
        holds=lambda found, *_: found.data[0].checkpoint_count > 0 and found.data[0].size_bytes > 0
    ),
    "get_telemetry": Case(holds=is_any),
}
REST = {
    **ADMIN,
    "get_server_capabilities": SERVICE["get_server_capabilities"],
    "get_training_run": Case(
        lambda w: given(w.run), lambda run, w, _: run.training_run_id == w.run
    ),
    "get_training_run_by_tinker_path": Case(
        on_state, lambda run, w, _: run.training_run_id == w.run
    ),
    "get_weights_info_by_tinker_path": Case(on_state, lambda info, *_: info.lora_rank == 4),
    "list_training_runs": Case(
        lambda _: given(limit=100),
        lambda found, w, _: w.run in [each.training_run_id for each in found.training_runs],
    ),
    "list_checkpoints": Case(
        lambda w: given(w.run),
        lambda found, w, _: w.state in [each.tinker_path for each in found.checkpoints],
    ),
    "list_user_checkpoints": Case(
        lambda _: given(limit=1000),
        lambda found, w, _: w.state in [each.tinker_path for each in found.checkpoints],
    ),
    "get_external_weights_urls": Case(
        lambda w: given(w.exported()), lambda found, *_: "adapter_model.safetensors" in found.urls
    ),
    "get_checkpoint_archive_url": Case(
        lambda w: given(w.run, w.state.partition(f"{w.run}/")[2]),
        lambda found, *_: is_url(found.url),
    ),
    "get_checkpoint_archive_url_from_tinker_path": Case(
        on_state, lambda found, *_: is_url(found.url)
    ),
    "delete_checkpoint": Case(
        lambda w: given(w.run, w.saved().partition(f"{w.run}/")[2]),
        lambda _, w, gave: w.kept(f"tinker://{w.run}/{gave.args[1]}") is None,
    ),
    "delete_checkpoint_from_tinker_path": Case(on_new_state, gone),
    "publish_checkpoint_from_tinker_path": Case(
        on_new_state, lambda _, w, gave: bool(w.kept(gave.args[0]).public)
    ),
    "unpublish_checkpoint_from_tinker_path": Case(
        on_new_state, lambda _, w, gave: not w.kept(gave.args[0]).public
    ),
    "set_checkpoint_ttl_from_tinker_path": Case(
        lambda w: given(w.saved(), 7200),
        lambda _, w, gave: w.kept(gave.args[0]).expires_at is not None,
    ),
    "copy_weights": Case(
        lambda w: given(w.state, PROJECT), lambda path, *_: path.startswith("tinker://")
    ),
    "list_sessions": Case(
        lambda _: given(limit=100), lambda found, w, _: w.session in found.sessions
    ),
    "get_session": Case(
        lambda w: given(w.session), lambda found, w, _: w.run in found.training_run_ids
    ),
    "search_sessions": Case(
        lambda w: given(types.SessionSearchRequest(session_id=w.session)),
        lambda found, w, _: [each.session_id for each in found.sessions] == [w.session],
    ),
    "assign_session_project": Case(lambda w: given(w.session, PROJECT), is_any),
    "export_session_trace": Case(lambda w: given(w.session), is_url),
    "get_sampler": Case(
        lambda w: given(w.sampler._sampling_session_id),
        lambda found, *_: found.base_model == BASE_MODEL,
    ),
    "whoami": Case(refused=["JWT"]),
}
CASES: dict[str, dict[str, Case]] = {
    "ServiceClient": SERVICE,
    "TrainingClient": TRAINING,
    "SamplingClient": SAMPLING,
    "RestClient": REST,
    "AdminClient": ADMIN,
}
