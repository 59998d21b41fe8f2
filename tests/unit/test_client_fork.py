"""In a forked child every entry works or says at once how to start workers instead.

Real forks, in a process of their own: what grpc does in a child of this one would end the tests.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from faults.peer import Peer
from tinsmith._sessions import Session

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    running = Peer()
    running.servicer.sample_breaks = 0
    running.servicer.capabilities.base_models.add(name="base")
    yield running
    running.stop()


def run(peer: Peer, code: str) -> list[str]:
    """Run a script that has `address`; returns its lines, and fails where it crashes or hangs."""
    head = f"import os, sys, tinsmith, multiprocessing, pickle\naddress = {peer.address!r}\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, error = process.communicate(timeout=TIMEOUT_S)
        finally:  # its children, too, which may hang as well
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out[-2000:] + error[-4000:]
    assert "never awaited" not in error
    # grpc says so where its fork handlers are on, which crash a child now and then.
    assert "fork_posix" not in error
    return out.splitlines()


ASK_EVERYTHING = """
import asyncio, inspect, warnings
warnings.simplefilter("ignore")
from tinsmith.cluster import connect

service = tinsmith.ServiceClient(base_url=address)
trainer = service.create_lora_training_client("base").result(20)
sampler = service.create_sampling_client(base_model="base").result(20)
rest = service.create_rest_client()
stubs = connect(address)
prompt = tinsmith.ModelInput.from_ints([1, 2])
datum = tinsmith.Datum(prompt, {"target_tokens": [1, 2], "weights": [1, 1]})
given = {
    "data": [datum], "loss_fn": "cross_entropy", "optim_params": tinsmith.AdamParams(),
    "prompt": prompt, "loss_fn_config": None,
}
asks_nobody = {
    "get_base_model", "get_info", "create_rest_client", "create_custom_loss",
    "save_weights_external", "opened", "attached", "publish_checkpoint_from_tinker_path",
    "unpublish_checkpoint_from_tinker_path", "get_console_url", "get_telemetry", "search_sessions",
    "assign_session_project", "export_session_trace", "get_sampler", "whoami", "get_audit_log",
    "get_external_weights_urls", "get_checkpoint_archive_url", "get_billing_usage",
    "get_checkpoint_archive_url_from_tinker_path", "get_current_checkpoint_storage_usage",
    "get_sampler_handle", "on_queue_state_change",
}
sampler.sample(prompt).result(20)
import tinsmith._loop as loop
import concurrent.futures
pending = tinsmith.APIFuture(concurrent.futures.Future())

def ask(name, call):
    try:
        result = call()
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        if inspect.isgenerator(result):
            result = next(result)
        print(name, "WORKED", type(result).__name__)
    except tinsmith.FailedPreconditionError as error:
        good = error.reason == "FORKED" and "spawn" in str(error)
        print(name, "TOLD" if good and "forkserver" in str(error) else repr(error))
    except BaseException as error:
        print(name, repr(error))
    sys.stdout.flush()

child = os.fork()
if child == 0:
    for client in (service, trainer, sampler, rest):
        for name, method in inspect.getmembers(client, inspect.ismethod):
            plain = name.removesuffix("_async")
            if name == "close" and client is sampler:
                client.close()  # there is nothing that it holds
                continue
            if name.startswith("_") or plain in asks_nobody:
                continue
            kwargs = {}
            signature = inspect.signature(getattr(client, plain)).parameters
            for each in signature.values():
                if each.name in given:
                    kwargs[each.name] = given[each.name]
                elif each.default is each.empty and each.kind is not each.VAR_KEYWORD:
                    kwargs[each.name] = "base"
                elif each.name == "tinker_path":
                    kwargs[each.name] = "tinsmith://m/weights/a"
            if name.startswith("forward_backward_custom"):
                kwargs["loss_fn"] = lambda data, logprobs: None
            if name.startswith("get_training_run_by"):
                kwargs["tinker_path"] = "tinsmith://m/weights/a"
            if plain == "create_sampling_client" and client is service:
                kwargs["base_model"] = "base"
            ask(type(client).__name__ + "." + name, lambda: method(**kwargs))
    for name in ("training", "sampler", "checkpoint", "close"):
        ask("Cluster." + name, lambda: getattr(stubs, name)())
    ask("connect", lambda: connect(address))
    ask("result", pending.result)
    ask("await", pending.result_async)
    copy = pickle.loads(pickle.dumps(sampler))
    ask("pickled.sample", lambda: copy.sample(prompt))
    new = tinsmith.ServiceClient(base_url=address)
    ask("new.create", lambda: new.create_lora_training_client("b"))
    ask("new.exit", lambda: new.__exit__(None, None, None))
    os._exit(0)
_, status = os.waitpid(child, 0)
print("status", status)
trainer.optim_step(tinsmith.AdamParams()).result(20)
print("parent works")
"""
"""Asks everything that there is of a forked child, one line for each."""


def test_every_entry_of_a_forked_child_says_spawn_or_forkserver(peer: Peer) -> None:
    """Every public method of every client and of the stubs, and every future from before."""
    lines = run(peer, ASK_EVERYTHING)
    assert lines[-2:] == ["status 0", "parent works"]
    assert len(lines) > 60
    assert [line for line in lines[:-2] if not line.endswith("TOLD")] == []


def test_a_process_pool_that_forks_is_told_and_one_that_spawns_works(peer: Peer) -> None:
    """ProcessPoolExecutor with pickled SamplingClients, after one call in the parent."""
    lines = run(
        peer,
        """
        import tempfile
        from concurrent.futures import ProcessPoolExecutor

        folder = tempfile.mkdtemp()
        with open(folder + "/tasks_of_a_pool.py", "w") as file:
            file.write(
                "import tinsmith\\n"
                "def task(sampler):\\n"
                "    prompt = tinsmith.ModelInput.from_ints([1])\\n"
                "    return sampler.sample(prompt).result(30).sequences[0].tokens\\n"
            )
        sys.path.insert(0, folder)
        from tasks_of_a_pool import task

        service = tinsmith.ServiceClient(base_url=address)
        trainer = service.create_lora_training_client("b").result(20)
        sampler = trainer.save_weights_and_get_sampling_client().result(20)
        print(task(sampler))
        for method in ("fork", "spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    print(method, list(pool.map(task, [sampler])))
                except tinsmith.FailedPreconditionError as error:
                    print(method, error.reason)
        """,
    )
    assert lines == [
        "[1, 2, 3, 4, 5]",
        "fork FORKED",
        "spawn [[1, 2, 3, 4, 5]]",
        "forkserver [[1, 2, 3, 4, 5]]",
    ]


def test_a_child_that_leaves_the_client_alone_ends_in_peace(peer: Peer) -> None:
    """Also where it drops what it inherited, and ends as any Python process does."""
    lines = run(
        peer,
        """
        import gc
        service = tinsmith.ServiceClient(base_url=address)
        trainer = service.create_lora_training_client("base").result(20)
        held = [trainer.optim_step(tinsmith.AdamParams())]
        child = os.fork()
        if child == 0:
            del service, trainer, held
            gc.collect()
            sys.exit(0)
        print(os.waitpid(child, 0)[1])
        held[0].result(20)
        """,
    )
    assert lines == ["0"]


def test_a_process_that_forks_before_it_uses_the_client_has_two_that_work(peer: Peer) -> None:
    """To import the client, and to make one, is no use of it."""
    lines = run(
        peer,
        """
        service = tinsmith.ServiceClient(base_url=address)
        child = os.fork()
        sampler = service.create_sampling_client(base_model="base").result(20)
        tokens = sampler.sample(tinsmith.ModelInput.from_ints([1])).result(20).sequences[0].tokens
        if child == 0:
            os._exit(0 if tokens == [1, 2, 3, 4, 5] else 1)
        print(os.waitpid(child, 0)[1], tokens)
        """,
    )
    assert lines == ["0 [1, 2, 3, 4, 5]"]


def test_models_of_forks_have_sessions_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ServiceClient that was made before the fork, and used in both: no id is given twice."""
    session = Session()
    ids = [session.next_model_id(), session.next_model_id()]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    ids += [session.next_model_id(), session.next_model_id()]
    parts = [each.split(":train:") for each in ids]
    assert [number for _, number in parts] == ["0", "1", "0", "1"]
    assert len({name for name, _ in parts}) == 2
