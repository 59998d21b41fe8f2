"""A whole cluster with keys, callers of several tenants, and what one of them owns in it.

It takes tokens of an issuer, too.
"""

import contextlib
import http.client
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from attack.requests import Caller
from clusters import RunningCluster
from issuers import Issuer
from tinsmith import v1 as pb
from tinsmith.cluster import Cluster, connect
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmithd.keys import KeyFile, NewKey, Scope
from training_calls import call, forward_backward, step

LORA = pb.LoraConfig(rank=2, seed=1)
TRAINING = pb.CheckpointKind.CHECKPOINT_KIND_TRAINING
SAMPLER = pb.CheckpointKind.CHECKPOINT_KIND_SAMPLER
SEEN_S = 0.6
"""By then every server has looked at the file of keys again."""
LIMITS = {
    "few": {"tenant_models_max": 1},
    "queued": {"tenant_queued_bytes_max": 100},
    "slow": {"tenant_tokens_per_minute_max": 10},
    "stored": {"tenant_stored_bytes_max": 1},
    "single": {"tenant_samples_max": 1},
}
"""Tenants who may have little of something."""


@dataclass(frozen=True)
class Owned:
    """What a tenant has."""

    model_id: str
    training: str
    sampler: str


def shown(key: str) -> Sequence[tuple[str, str]]:
    """Metadata that show a key."""
    return ((AUTHORIZATION, f"{SCHEME} {key}"),)


class Keyed:
    """The cluster.

    Attributes:
        cluster: It.
        keys: Its file of keys.
        caller: Sends bytes to it.
        issuer: Whose tokens it takes.
        made: Every key that there is or was, by a name.
    """

    def __init__(
        self,
        cluster: RunningCluster,
        keys: KeyFile,
        issuer: Issuer,
        stack: contextlib.ExitStack,
    ) -> None:
        self.cluster, self.keys, self._stack = cluster, keys, stack
        self.issuer = issuer
        self.caller = stack.enter_context(Caller(cluster))
        self.made: dict[str, NewKey] = {}
        self._stubs: dict[str, Cluster] = {}

    def add(self, name: str, tenant: str = "", scope: Scope = Scope.TENANT) -> str:
        """Make a key under a name; its text."""
        self.made[name] = self.keys.create(tenant or name, scope)
        return self.made[name].text

    def key(self, name: str) -> str:
        """The key of a name."""
        return self.made[name].text

    def stubs(self, name: str) -> Cluster:
        """Stubs that show a key, or a token that begins like one."""
        if name not in self._stubs:
            key = name if name.startswith("eyJ") else self.key(name)
            made = connect(self.cluster.address, api_key=key)
            self._stubs[name] = self._stack.enter_context(made)
        return self._stubs[name]

    def gateway_status(self, key: str) -> int:
        """What the gateway answers a request with a key."""
        assert self.cluster.gateway_url is not None
        where = self.cluster.gateway_url.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(where, timeout=60)) as connection:
            connection.request("GET", "/v1/models", headers={"x-api-key": key})
            return connection.getresponse().status

    def create(self, name: str, model_id: str = "") -> str:
        """Make a model with a key; its id."""
        request = pb.CreateModelRequest(lora_config=LORA, model_id=model_id)
        return self.stubs(name).training.CreateModel(request).model.model_id

    def own(self, name: str, model_id: str = "") -> Owned:
        """Train a step and save it, of both kinds."""
        stubs = self.stubs(name)
        model_id = self.create(name, model_id)
        forward_backward(stubs, call(model_id, 1))
        stubs.training.OptimStep(step(model_id, 2, learning_rate=1e-3))
        saved = [
            stubs.training.SaveCheckpoint(
                pb.SaveCheckpointRequest(model_id=model_id, seq_id=seq_id, name="one", kind=kind)
            ).checkpoint_path
            for seq_id, kind in ((3, TRAINING), (4, SAMPLER))
        ]
        return Owned(model_id, *saved)


def variables(issuer: Issuer) -> dict[str, str]:
    """The environment of servers that take an issuer's tokens, whose claim `groups` says their
    scope."""
    groups = {"readers": "read-only", "users": "tenant", "operators": "admin"}
    settings = issuer.settings(oidc_scope_claim="groups", oidc_scopes=json.dumps(groups))
    return {
        f"TINSMITH_{section}_{name.upper()}": str(value)
        for section in ("TRAINING", "SAMPLER", "CHECKPOINT", "GATEWAY")
        for name, value in settings.items()
    }


@contextlib.contextmanager
def keyed_cluster(base_model: Path, folder: Path) -> Iterator[Keyed]:
    """One for the body of the `with`, with a gateway."""
    keys = KeyFile(folder / "keys.json")
    with contextlib.ExitStack() as stack:
        first = keys.create("alice")
        for tenant, limits in LIMITS.items():
            keys.set_limits(tenant, limits)
        issuer = stack.enter_context(Issuer())
        with mock.patch.dict(os.environ, variables(issuer)):
            running = RunningCluster(
                *(base_model, folder / "data"),
                engine="reference",
                keys_file=keys.path,
                gateway_port=0,
            )
        cluster = stack.enter_context(running)
        keyed = Keyed(cluster, keys, issuer, stack)
        keyed.made["alice"] = first
        for name in ("bob", *LIMITS):
            keyed.add(name)
        keyed.add("admin", scope=Scope.ADMIN)
        keyed.add("bob's reader", "bob", Scope.READ_ONLY)
        keyed.add("alice's reader", "alice", Scope.READ_ONLY)
        keyed.add("revoked", "alice")
        keyed.keys.revoke(keyed.made["revoked"].record.key_id)
        time.sleep(SEEN_S)
        yield keyed
