"""What scripts written for Tinker trip over: names of parameters, errors, futures, addresses."""

import asyncio
import concurrent.futures
import inspect
import pickle
import socketserver
import threading
import time
from typing import Any

import grpc
import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import errors

PROMPT = tinsmith.ModelInput.from_ints([1, 2])
ADAM = tinsmith.AdamParams()


# --- names ----------------------------------------------------------------------------------------

TINKERS_PARAMETERS = {
    "ServiceClient": {
        "__init__": "user_metadata project_id display_name base_url api_key",
        "create_lora_training_client":
            "base_model rank seed train_mlp train_attn train_unembed user_metadata optimizer",
        "create_training_client_from_state":
            "path base_model user_metadata weights_access_token optimizer",
        "create_training_client_from_state_with_optimizer":
            "path base_model user_metadata weights_access_token",
        "create_sampling_client": "model_path base_model retry_config record_stability_info",
        "copy_weights": "path ttl_seconds weights_access_token",
        "close": "status detail",
    },
    "TrainingClient": {
        "forward": "data loss_fn loss_fn_config",
        "forward_backward": "data loss_fn loss_fn_config",
        "forward_backward_custom": "data loss_fn loss_type_input",
        "optim_step": "optim_params adam_params",
        "save_state": "name ttl_seconds overwrite user_metadata",
        "load_state": "path weights_access_token",
        "load_state_with_optimizer": "path weights_access_token",
        "save_weights_for_sampler": "name ttl_seconds user_metadata",
        "save_weights_and_get_sampling_client": "name retry_config record_stability_info kind",
        "create_sampling_client": "model_path retry_config record_stability_info",
    },
    "SamplingClient": {
        "sample":
            "prompt num_samples sampling_params include_prompt_logprobs topk_prompt_logprobs "
            "topk_sample_logprobs target_prompt_logprobs prompt_alt_tokens_k "
            "prompt_logprobs_last_n",
        "compute_logprobs": "prompt prompt_logprobs_last_n",
    },
    "RestClient": {
        "__init__": "base_url api_key",
        "get_training_run": "training_run_id access_scope",
        "get_training_run_by_tinker_path": "tinker_path access_scope",
        "get_weights_info_by_tinker_path": "tinker_path",
        "list_training_runs": "limit offset access_scope project_id",
        "list_checkpoints": "training_run_id",
        "list_user_checkpoints": "limit offset",
        "delete_checkpoint": "training_run_id checkpoint_id",
        "delete_checkpoint_from_tinker_path": "tinker_path path",
        "publish_checkpoint_from_tinker_path": "tinker_path path",
        "unpublish_checkpoint_from_tinker_path": "tinker_path path",
        "set_checkpoint_ttl_from_tinker_path": "tinker_path ttl_seconds path",
        "copy_weights": "path destination_project_id ttl_seconds weights_access_token",
    },
    "TensorData": {
        "__init__": "data dtype shape sparse_crow_indices sparse_col_indices",
        "from_numpy": "array",
        "from_torch": "tensor",
        "to_numpy": "pad_value",
        "to_torch": "pad_value",
        "from_torch_sparse": "tensor pad_value",
    },
    "SampleResponse": {
        "__init__":
            "sequences prompt_logprobs_np topk_prompt_logprobs_np target_prompt_logprobs "
            "prompt_cache_hit_tokens prompt_alt_tokens",
    },
    "SampledSequence": {
        "__init__": "stop_reason sequence_id tokens_np logprobs_np topk_logprobs_np",
    },
    "TopkLogprobs": {"__init__": "token_ids logprobs"},
    "PromptAltTokens": {"__init__": "tokens logprobs"},
    "ModelInput": {"__init__": "chunks", "from_ints": "tokens", "append": "chunk",
                   "append_int": "token"},
    "EncodedTextChunk": {"__init__": "tokens type"},
    "Datum": {"__init__": "model_input loss_fn_inputs model_input_spans loss_fn_input_spans"},
    "SamplingParams": {"__init__": "max_tokens seed stop temperature top_k top_p"},
    "AdamParams": {"__init__": "learning_rate beta1 beta2 eps weight_decay grad_clip_norm"},
    "LoraConfig": {"__init__": "rank seed train_unembed train_mlp train_attn"},
    "APIFuture": {"result": "timeout", "result_async": "timeout"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "method"),
    [(cls, method) for cls, methods in TINKERS_PARAMETERS.items() for method in methods],
)
def test_tinkers_names_of_parameters_are_taken(cls: str, method: str) -> None:
    """Every keyword that the SDK's methods have, in the SDK's order where they are positional."""
    owner = getattr(tinsmith, cls, None) or getattr(tinsmith.types, cls)
    wanted = TINKERS_PARAMETERS[cls][method].split()
    signature = inspect.signature(owner if method == "__init__" else getattr(owner, method))
    names = [name for name in signature.parameters if name != "self"]
    assert [name for name in names if name in wanted] == wanted


def test_a_path_is_taken_under_both_names(peer: Peer) -> None:
    """`tinker_path`, as in the SDK, and `path`; by position too, but not both."""
    rest = tinsmith.RestClient(base_url=peer.address, api_key="ignored")
    for index, call in enumerate(
        (
            lambda path: rest.delete_checkpoint_from_tinker_path(path),
            lambda path: rest.delete_checkpoint_from_tinker_path(tinker_path=path),
            lambda path: rest.delete_checkpoint_from_tinker_path(path=path),
        )
    ):
        path = f"tinsmith://m/weights/{index}"
        peer.servicer.checkpoints.add(path)
        call(path).result(10)
        assert path not in peer.servicer.checkpoints
    for given in ({}, {"tinker_path": path, "path": path}):
        with pytest.raises(tinsmith.InvalidArgumentError):
            rest.delete_checkpoint_from_tinker_path(**given)


# --- errors ---------------------------------------------------------------------------------------

TREE = {
    "TinkerError": (Exception, None),
    "RequestFailedError": (tinsmith.TinkerError, None),
    "APIError": (tinsmith.TinkerError, None),
    "APIConnectionError": (tinsmith.APIError, None),
    "APITimeoutError": (tinsmith.APIConnectionError, None),
    "APIStatusError": (tinsmith.APIError, 500),
    "BadRequestError": (tinsmith.APIStatusError, 400),
    "AuthenticationError": (tinsmith.APIStatusError, 401),
    "BillingError": (tinsmith.APIStatusError, 402),
    "PermissionDeniedError": (tinsmith.APIStatusError, 403),
    "NotFoundError": (tinsmith.APIStatusError, 404),
    "ConflictError": (tinsmith.APIStatusError, 409),
    "UnprocessableEntityError": (tinsmith.APIStatusError, 422),
    "RateLimitError": (tinsmith.APIStatusError, 429),
    "InternalServerError": (tinsmith.APIStatusError, 500),
}


def test_errors_are_classes_of_their_own_in_tinkers_tree() -> None:
    """Each below its parent, none the same as another, each with status and message."""
    kinds = [getattr(tinsmith, name) for name in TREE]
    assert len(set(kinds)) == len(TREE)
    for kind, (parent, status) in zip(kinds, TREE.values(), strict=True):
        assert issubclass(kind, parent)
        error = kind("text")
        assert (error.message, str(error)) == ("text", "text")
        if status is not None:
            assert error.status_code == status
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.message) == (kind, "text")
    assert not issubclass(tinsmith.APIConnectionError, tinsmith.APIStatusError)
    assert not issubclass(tinsmith.APIStatusError, tinsmith.APIConnectionError)
    assert not issubclass(tinsmith.RateLimitError, tinsmith.RequestFailedError)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_is_either_a_refusal_or_no_answer(code: grpc.StatusCode) -> None:
    """`except APIStatusError` before `except APIConnectionError` swallows no lost connection."""

    class Failure(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return code

        def details(self) -> str:
            return "text"

        def trailing_metadata(self) -> Any:
            return ()

    error = errors.from_rpc_error(Failure())
    nobody = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert isinstance(error, tinsmith.APIConnectionError) == nobody
    assert isinstance(error, tinsmith.APIStatusError) != nobody
    if not nobody:
        assert 400 <= error.status_code < 600  # type: ignore[attr-defined]


def test_a_service_that_nobody_reaches_is_no_status() -> None:
    service = tinsmith.ServiceClient(base_url="127.0.0.1:1", give_up_after_s=0.1)
    try:
        service.create_lora_training_client("base").result(30)
    except tinsmith.APIStatusError:
        pytest.fail("a lost connection has no status")
    except tinsmith.APIConnectionError as error:
        assert "127.0.0.1:1" in error.message  # noqa: PT017


# --- futures --------------------------------------------------------------------------------------


def test_a_waiter_that_gives_up_leaves_the_future_to_the_others() -> None:
    """Timed out, cancelled, or in a loop that ends: the others get the result."""
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    future = tinsmith.APIFuture(source)
    with pytest.raises(TimeoutError):
        future.result(0.01)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)  # type: ignore[arg-type]
        cancelled = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()

    asyncio.run(give_up())
    asyncio.run(give_up())
    found: list[int] = []
    waiters = [threading.Thread(target=lambda: found.append(future.result(10))) for _ in range(2)]

    async def wait() -> None:
        asyncio.get_running_loop().call_later(0.01, source.set_result, 7)
        found.extend(await asyncio.gather(future, future, future.result_async(10)))

    for thread in waiters:
        thread.start()
    asyncio.run(wait())
    for thread in waiters:
        thread.join(10)
    assert found == [7] * 5
    assert not source.cancelled()


def test_to_cancel_the_future_itself_is_for_everybody() -> None:
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    future = tinsmith.APIFuture(source)

    async def wait() -> None:
        waiting = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        assert future.future().cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(wait())
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(1)


def test_polling_a_future_costs_no_memory() -> None:
    """A loop that asks with a short timeout leaves nothing behind for each time."""
    source: concurrent.futures.Future[int] = concurrent.futures.Future()
    future = tinsmith.APIFuture(source)

    async def poll() -> None:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await future.result_async(0.0001)

    asyncio.run(poll())
    assert len(source._done_callbacks) == 1  # type: ignore[attr-defined]


def test_async_twins_make_their_calls_in_the_order_of_the_program(peer: Peer) -> None:
    """Not in that in which somebody awaits them."""
    service = tinsmith.ServiceClient(base_url=peer.address)
    trainer: Any = service.create_lora_training_client("base").result(10)
    datum = tinsmith.Datum(PROMPT, {"target_tokens": [1, 2], "weights": [1, 1]})

    async def train() -> None:
        first = trainer.forward_backward_async([datum], "cross_entropy")
        second = trainer.optim_step_async(ADAM)
        await (await second)
        await (await first)

    asyncio.run(train())
    assert peer.servicer.applied == [(1, "forward_backward"), (2, "optim_step")]


# --- pickles and addresses ------------------------------------------------------------------------


def test_a_pickled_sampling_client_keeps_its_settings() -> None:
    """Where it goes, and how long it tries."""
    service = tinsmith.ServiceClient(base_url="127.0.0.1:1", give_up_after_s=0.1)
    sampler = service.create_sampling_client(base_model="base").result(10)
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy._connection.settings == sampler._connection.settings
    began_s = time.monotonic()
    with pytest.raises(tinsmith.UnavailableError):
        copy.sample(PROMPT).result(60)
    assert time.monotonic() - began_s < 60


def test_tinkers_variable_for_the_address_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any way to write an address, ours comes first, and a path is refused rather than dropped."""
    monkeypatch.delenv("TINSMITH_ADDRESS", raising=False)
    ways = {
        "trainer:1234": "trainer:1234",
        "http://trainer:1234/": "trainer:1234",
        "https://trainer": "https://trainer:443",
        "HTTPS://trainer:1234//": "https://trainer:1234",
        "http://[::1]:1": "[::1]:1",
    }
    for given, address in ways.items():
        monkeypatch.setenv("TINKER_BASE_URL", given)
        assert tinsmith.ServiceClient()._connection.address == address
        assert tinsmith.RestClient()._connection.address == address
    assert tinsmith.ServiceClient(base_url="other:1")._connection.address == "other:1"
    for url in ("https://tinker.example/services/prod", "http://h:1/api", "http://h:1?x"):
        monkeypatch.setenv("TINKER_BASE_URL", url)
        for make in (tinsmith.ServiceClient, tinsmith.RestClient):
            with pytest.raises(tinsmith.InvalidArgumentError, match="path") as refusal:
                make()
            assert refusal.value.field == "TINKER_BASE_URL"
    monkeypatch.setenv("TINSMITH_ADDRESS", "ours:1")
    assert tinsmith.ServiceClient()._connection.address == "ours:1"


class _OldHttp(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1024)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def test_a_server_of_http_1_is_told_at_once() -> None:
    """Such as a gateway, whose address is in TINKER_BASE_URL: nobody waits an hour for it."""
    with socketserver.TCPServer(("127.0.0.1", 0), _OldHttp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(tinsmith.InvalidArgumentError, match=r"HTTP/1\.1") as refusal:
            tinsmith.ServiceClient(base_url=url).create_lora_training_client("base").result(30)
        assert refusal.value.field == "base_url"
        server.shutdown()


@pytest.mark.parametrize("bad", ["host", "host:", ":1", "host:x", "host:70000", 5, "", "h:１",
                                 "http://host:1/path",
                                 "ftp://host:1", "https://u:p@host", "http://host"])  # fmt: skip
def test_an_address_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        tinsmith.ServiceClient(base_url=bad)
    assert refusal.value.field == "base_url"
