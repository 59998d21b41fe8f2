"""What a tenant leaves under way at a gateway takes nobody else's share of it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateways import RunningGateway, ask, running_gateway
from keyed import SEEN_S, Keyed
from sdk_calls import call, datum, packed
from tinsmithd.gateway.tinker.kept import Answer, KeptAnswers
from tinsmithd.keys import Scope

PATH = "/api/v1"
PATIENCE_S = 30.0


@contextlib.contextmanager
def gateway_of(keyed: Keyed, folder: Path, **limits: object) -> Iterator[RunningGateway]:
    """A gateway with little room in front of a cluster with keys."""
    file = folder / "cluster.key"
    file.write_text(keyed.keys.create("gateway", Scope.SERVER).text)
    with running_gateway(
        keyed.cluster.address, folder, keys_file=keyed.keys.path, cluster_key_file=file, **limits
    ) as gateway:
        assert ask(gateway, "/livez") == (200, {"status": "ok"})
        time.sleep(SEEN_S)  # by then the servers know its key
        end_s = time.monotonic() + PATIENCE_S
        while ask(gateway, "/healthz")[0] != 200:
            assert time.monotonic() < end_s
        yield gateway


def post(keyed: Keyed, gateway: RunningGateway, name: str, path: str, body: Any) -> tuple[int, Any]:
    return ask(gateway, f"{PATH}/{path}", body, headers={"x-api-key": keyed.key(name)})


def granted(keyed: Keyed, gateway: RunningGateway, name: str, path: str, body: Any) -> Any:
    """What is answered in the end, as an SDK asks: where a request's time is over, once more."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        status, found = post(keyed, gateway, name, path, body)
        if status not in (408, 503) or time.monotonic() > end_s:
            assert status == 200, found
            return found


def model_of(keyed: Keyed, gateway: RunningGateway, name: str) -> str:
    """A model that somebody makes by the gateway."""
    session = granted(keyed, gateway, name, "create_session", {})
    base = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": "tiny-llama"}
    made = {**base, "lora_config": {"rank": 2}}
    promise = granted(keyed, gateway, name, "create_model", made)
    asked = {"request_id": promise["request_id"]}
    return str(granted(keyed, gateway, name, "retrieve_future", asked)["model_id"])


def test_results_that_one_tenant_waits_for_leave_room_for_others(
    keyed: Keyed, tmp_path: Path
) -> None:
    """Half of them at most are one tenant's; its own next call is 429, and a poll too."""
    with gateway_of(keyed, tmp_path, results_under_way_max=8) as gateway:
        models = {name: model_of(keyed, gateway, name) for name in ("alice", "bob")}

        def step(name: str, seq_id: int) -> tuple[int, Any]:
            body = {"model_id": models[name], "seq_id": seq_id, "adam_params": {}}
            return post(keyed, gateway, name, "optim_step", body)

        for seq_id in range(2, 6):  # 1 does not come
            assert step("alice", seq_id)[0] == 200
        status, said = step("alice", 6)
        assert (status, said["reason"]) == (429, "SERVER_BUSY"), said
        assert step("alice", 5)[0] == 200  # it is under way
        status, promise = step("bob", 1)
        assert status == 200, promise
        asked = {"request_id": promise["request_id"]}
        assert post(keyed, gateway, "bob", "retrieve_future", asked)[0] == 200


def test_data_that_one_tenant_has_here_leave_room_for_others(keyed: Keyed, tmp_path: Path) -> None:
    """Calls that wait for earlier ones keep theirs."""
    limits = {"received_bytes_max": 1_200_000, "body_bytes_max": 250_000, "request_s_max": 1}
    with gateway_of(keyed, tmp_path, **limits) as gateway:
        models = {name: model_of(keyed, gateway, name) for name in ("alice", "bob")}
        large = datum(weights=packed(np.ones(60_000), "float32"))

        def refused(seq_id: int) -> tuple[int, str]:
            more = call(models["alice"], seq_id, data=[large])
            status, said = post(keyed, gateway, "alice", "forward_backward", more)
            return status, said["reason"]

        def taken(name: str, seq_id: int) -> None:
            granted(keyed, gateway, name, "forward_backward", call(models[name], seq_id))

        taken("alice", 1000)  # waits for those before it
        for seq_id in (2000, 2500):
            assert refused(seq_id) == (503, "QUEUE_FULL")
        assert refused(3000) == (429, "QUEUE_FULL")
        taken("bob", 1)


@pytest.fixture
def as_caller(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has what follows done for a caller."""
    now = [""]
    monkeypatch.setattr("tinsmithd.gateway.tinker.kept.part", lambda: now[0])

    def be(name: str) -> None:
        now[0] = name

    return be


def test_who_fills_the_results_that_are_kept_loses_its_own(as_caller: Any) -> None:
    """The oldest of them; another one's stay, and are nobody else's."""
    kept = KeptAnswers(20_000)
    answer = Answer(bytes(3000), "x")
    as_caller("alice")
    kept.keep("a", answer)
    as_caller("bob")
    for number in range(20):
        kept.keep(f"b{number}", answer)
    assert kept.nbytes <= 20_000
    assert "b19" in kept
    assert "b0" not in kept
    assert kept.get("a") is None
    as_caller("alice")
    assert kept.get("a") == answer
    kept.forget("a")
    assert "a" not in kept
    as_caller("bob")
    for number in range(20):
        kept.forget(f"b{number}")
    assert kept.nbytes == 0
    kept.keep("large", Answer(bytes(30_000), "x"))
    assert "large" not in kept
