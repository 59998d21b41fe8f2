"""Each server is replaced, one after the other, by one of another release, under load.

`make upgrade OLD=<commit or tag>` runs all orders on whole clusters. Here a cluster without Sampler
and gateway is upgraded, whose ranks are new from the start: old ones take seconds to import torch.
"""

import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import tinsmith
from faults.recovering import data, model_of, train, values
from faults.users import SCRIPT
from releases.code import NEW, OLD, NoSuchCommit, Release, archived
from releases.mixed import DOCUMENTED, Mixed
from tinsmith import types

FULL = os.environ.get("TINSMITH_TEST_UPGRADE", "") == "full"
STEPS = 6
"""Made in each phase: calls of all of them are under way while a server is replaced."""
SHORT = ("checkpoint", "trainer", "training")
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PROMPT = types.ModelInput.from_ints([5, 200, 31, 7, 90])


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release that is upgraded."""
    try:
        return archived(OLD, tmp_path_factory.mktemp("old"))
    except NoSuchCommit as error:
        if FULL:
            raise
        pytest.skip(f"this checkout lacks the history: {error}")


class Load:
    """What a user does all the time; it knows nothing of releases.

    Attributes:
        seen: Every value that came back.
        asked: Answers of the gateway.
    """

    def __init__(self, cluster: Mixed, *, seed: int) -> None:
        self._cluster = cluster
        self._service = tinsmith.ServiceClient(base_url=cluster.addresses["training"])
        self._model = model_of(self._service, seed)
        self._at = 0
        self.seen: list[Any] = []

    def begin(self) -> "Iterator[Future[Any]]":
        """Send the calls of a phase."""
        for step in range(self._at, self._at + STEPS):
            yield self._model.forward_backward(data(step), "cross_entropy")
            yield self._model.optim_step(types.AdamParams(learning_rate=1e-2))  # type: ignore[misc]
        self._at += STEPS

    def end(self, calls: "Sequence[Future[Any]]") -> None:
        """Read what they answered; save, load and sample."""
        self.seen += [values(call.result(120)) for call in calls]
        path = self._model.save_state(f"at-{self._at}").result(120).path
        self._model.load_state_with_optimizer(path).result(120)
        if "sampler" in self._cluster.kinds:
            self.sample()
        if "gateway" in self._cluster.kinds:
            self.ask()

    def sample(self) -> None:
        """Sample from the weights as they are now."""
        sampler = self._model.save_weights_and_get_sampling_client().result(120)
        params = types.SamplingParams(max_tokens=12, seed=self._at)
        for sequence in sampler.sample(PROMPT, 2, params).result(120).sequences:
            self.seen.append((list(sequence.tokens), list(sequence.logprobs or ())))

    def ask(self) -> None:
        """Ask the gateway as SDKs do, again and again while it or another server is away."""
        url = f"http://{self._cluster.addresses['gateway']}/v1/completions"
        body = b'{"model": "tiny-llama", "prompt": "abc", "max_tokens": 8, "seed": 3}'
        headers = {"content-type": "application/json", "authorization": "Bearer tml-none"}
        for _ in range(600):
            try:
                request = urllib.request.Request(url, body, headers)
                with DIRECTLY.open(request, timeout=60) as response:
                    answer = response.read().decode()
                self.seen.append(answer.partition('"choices":')[2].partition('"usage"')[0])
                return
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise AssertionError(error.read()) from error
            except OSError:
                pass
            threading.Event().wait(0.1)
        raise AssertionError("the gateway did not come back")

    def phase(self, replace: "tuple[str, Release] | None" = None) -> None:
        """Some steps, while a server is replaced."""
        calls = list(self.begin())
        if replace is not None:
            calls[0].result(120)  # the load has begun
            self._cluster.replace(*replace)
        self.end(calls)


def undisturbed(cluster: Mixed, phases: int) -> list[Any]:
    """What the same calls give on a cluster to which nothing happens."""
    twin = Load(cluster, seed=1)
    for _ in range(phases):
        twin.phase()
    return twin.seen


def upgraded(cluster: Mixed, order: Sequence[str]) -> Load:
    """Replace the servers of a cluster in an order, under load."""
    load = Load(cluster, seed=1)
    load.phase()
    for kind in order:
        load.phase((kind, NEW))
    load.phase()
    return load


def script_of(release: Release, cluster: Mixed, log: Path) -> str:
    """What a script sees whose client is of a release."""
    command = [sys.executable, str(SCRIPT), "--address", cluster.addresses["training"]]
    options = ["--base-model", "tiny-llama", "--steps", "21", "--batch", "2", "--length", "12"]
    done = subprocess.run(
        [*command, *options, "--log", str(log)],
        env=release.variables(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return log.read_text()


@pytest.mark.skipif(FULL, reason="the full form has this and more")
def test_servers_are_replaced_under_load_in_the_documented_order(
    tiny_model: Path, tmp_path: Path, old: Release
) -> None:
    """No call fails, no step is lost or made twice, and every bit is that of a model that nothing
    happened to: of calls that were under way while old and new were side by side."""
    order = ("checkpoint", "training")
    with Mixed(tiny_model, tmp_path, SHORT) as cluster:
        cluster.start(old, NEW)
        load = upgraded(cluster, order)
        assert load.seen == undisturbed(cluster, len(order) + 2)


@pytest.mark.skipif(not FULL, reason="`make upgrade` runs it")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_whole_cluster_is_upgraded_in_either_order(
    tiny_model: Path, tmp_path: Path, old: Release, backwards: bool
) -> None:
    """With Sampler and gateway, and clients of both releases on servers of both; the twin is made
    on old servers before, and on new ones after."""
    order = DOCUMENTED[::-1] if backwards else DOCUMENTED
    with Mixed(tiny_model, tmp_path / "twin") as cluster:
        cluster.start(old)
        twin = undisturbed(cluster, len(order) + 2)
        old_on_old = script_of(old, cluster, tmp_path / "old-on-old.log")
        new_on_old = script_of(NEW, cluster, tmp_path / "new-on-old.log")
        assert new_on_old == old_on_old
    with Mixed(tiny_model, tmp_path / "upgraded") as cluster:
        cluster.start(old)
        assert upgraded(cluster, order).seen == twin
        assert undisturbed(cluster, len(order) + 2) == twin
        assert script_of(old, cluster, tmp_path / "old-on-new.log") == old_on_old
        assert script_of(NEW, cluster, tmp_path / "new-on-new.log") == old_on_old


@pytest.mark.skipif(not FULL, reason="`make upgrade` runs it")
@pytest.mark.timeout(300)
def test_old_ranks_come_back_to_a_new_server_and_new_ones_to_an_old_server(
    tiny_model: Path, tmp_path: Path, old: Release
) -> None:
    """Also with calls to be replayed: a model goes on from what ranks of the other release made."""
    for server, first, second in ((NEW, old, NEW), (NEW, NEW, old), (old, NEW, old)):
        name = f"{server.name}-{first.name}-{second.name}"
        with Mixed(tiny_model, tmp_path / name, SHORT, snapshot_steps=100) as cluster:
            cluster.start(server)
            cluster.replace("trainer", first)
            client = model_of(tinsmith.ServiceClient(base_url=cluster.addresses["training"]))
            seen = train(client, 0, 3)
            cluster.replace("trainer", second)
            seen += train(client, 3, 5)
            twin = model_of(tinsmith.ServiceClient(base_url=cluster.addresses["training"]))
            assert train(twin, 0, 5) == seen
