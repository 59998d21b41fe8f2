"""deploy/overlays/ci-secure on a real Kubernetes: keys, TLS, an object store, and clients outside.

As test_cluster.py, with the real SmolLM2 and two Checkpoint servers over SeaweedFS. Clients come
through ports of the node, whose address must be reachable from here. TINSMITH_TEST_ROLLOUTS is how
often everything is rolled; the object store is none of it.
"""

import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from certificates import Issued
from kube import seaweedfs
from kube.cluster import (
    BASE_MODEL,
    ROOT,
    KubeCluster,
    fresh_namespace,
    here,
    kind_of,
    without_names,
)
from kube.pod_logs import PodLogs
from kube.programs_outside import Lines, Program
from tinsmithd.keys import KeyFile, Scope

pytestmark = [pytest.mark.timeout(1200), pytest.mark.real_model]

STEPS = 8
ROLLOUTS = int(os.environ.get("TINSMITH_TEST_ROLLOUTS", "5"))
BETWEEN_STEPS = 3
"""Steps that each tenant makes between two rollouts."""
SERVERS = ("training", "checkpoint", "sampler", "gateway")
EVERYTHING = (*SERVERS, "trainer")
QUICKSTART = ROOT / "client" / "examples" / "sft_loop.py"
TENANT = Path(__file__).with_name("tenant.py")
NOTHING = ["CHECKPOINT_NOT_FOUND", "MODEL_NOT_FOUND"]
SEEDS = {"alice": 7, "bob": 8}
LIST = """
import json, tinsmith
runs = tinsmith.ServiceClient().create_rest_client().list_training_runs().result().training_runs
print(json.dumps([run.training_run_id for run in runs]))
"""
LOOK = """
import sys, tinsmith
rest = tinsmith.ServiceClient().create_rest_client()
path, model_id = sys.argv[1:]
for ask in (
    lambda: rest.get_weights_info_by_tinker_path(path).result(),
    lambda: rest.get_training_run(model_id).result(),
):
    try:
        ask()
        print("there")
    except tinsmith.NotFoundError as error:
        print(error.reason)
"""


@dataclass(frozen=True)
class Outside:
    """What clients outside of the cluster know.

    Attributes:
        cluster: For what only an administrator does.
        node: Address of the node.
        ca: File of the authority.
        keys: Keys of tenants, by their names.
        logs: Folder of what pods said that are gone.
    """

    cluster: KubeCluster
    node: str
    ca: Path
    keys: dict[str, str]
    logs: Path

    def environment(self, tenant: str = "", *, ca: bool = True) -> dict[str, str]:
        """Of a program that is one of the tenants, or none, and knows the authority or not."""
        found = {k: v for k, v in here().items() if not k.startswith(("TINSMITH", "TINKER"))}
        for name, port in (("", 30051), ("_SAMPLER", 30052), ("_CHECKPOINT", 30053)):
            found[f"TINSMITH_ADDRESS{name}"] = f"https://{self.node}:{port}"
        if ca:
            found["TINSMITH_CA_FILE"] = str(self.ca)
        if tenant:
            found["TINSMITH_API_KEY"] = self.keys[tenant]
        return found

    def runs(self, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """A program that lists all models that it sees."""
        return run("-c", LIST, environment=environment)

    def tenant(self, name: str, *counts: int) -> Program:
        """`tenant.py` of a tenant. Alice samples at the Samplers, Bob through the gateway.

        Args:
            name: The tenant's.
            counts: How many steps and draws; none: until it is told.
        """
        environment = self.environment(name)
        environment |= {"SSL_CERT_FILE": str(self.ca)}
        gateway = "-" if name == "alice" else f"https://{self.node}:30080/v1"
        arguments = (str(SEEDS[name]), gateway, *map(str, counts))
        return Program(f"{name}'s script", TENANT, arguments, environment)

    def restart_everything(self) -> None:
        """`kubectl rollout restart` of all, all at once."""
        names = [f"{kind_of(name)}/{name}" for name in EVERYTHING]
        self.cluster("rollout", "restart", *names)


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python program outside of the cluster, to its end."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def outside(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("secure")
    with fresh_namespace("tinsmith-secure") as cluster:
        node = cluster.node_address()
        issued = Issued(folder / "tls", names=(*SERVERS, "localhost", "127.0.0.1", node))
        file = KeyFile(folder / "keys.json")
        server = folder / "cluster.key"
        server.write_text(file.create(scope=Scope.SERVER).text)
        keys = {tenant: file.create(tenant).text for tenant in ("alice", "bob")}
        cluster.secret("tinsmith-tls", issued.certificate, issued.key, issued.ca)
        cluster.secret("tinsmith-keys", file.path, server)
        assert real_model.name == BASE_MODEL
        cluster.secret("tinsmith-store", *seaweedfs.files(folder))
        cluster.deploy(real_model, "ci-secure", lambda: seaweedfs.make_bucket(cluster))
        cluster.wait_ready(*SERVERS)
        yield Outside(cluster, node, issued.ca, keys, tmp_path_factory.mktemp("logs"))


def test_a_script_trains_from_outside(outside: Outside) -> None:
    """Twice the same, by two tenants; each sees its own and nothing of the other."""
    of_alice, of_bob = (
        outside.cluster.run_script(STEPS, here=outside.environment(tenant))
        for tenant in ("alice", "bob")
    )
    assert len(of_alice) == STEPS + 2
    assert without_names(of_alice) == without_names(of_bob)
    for tenant, lines in (("alice", of_alice), ("bob", of_bob)):
        listed = outside.runs(outside.environment(tenant))
        assert json.loads(listed.stdout) == [lines[0]["model_id"]], listed.stderr


def test_the_quickstart_runs_from_outside(outside: Outside, tmp_path: Path) -> None:
    """The README's script as it is, with address, key and authority in the environment; what it
    leaves is there for its tenant alone."""
    environment = outside.environment("alice")
    done = run(str(QUICKSTART), "--out", str(tmp_path), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = re.search(r"held-out loss (\S+) → (\S+) nats", done.stdout)
    assert losses is not None, done.stdout
    assert float(losses[2]) < 0.3 * float(losses[1])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    path = (tmp_path / "checkpoint.txt").read_text()
    ids = (path, path.split("/")[2])
    for tenant, said in (("alice", ["there", "there"]), ("bob", NOTHING)):
        looked = run("-c", LOOK, *ids, environment=outside.environment(tenant))
        assert looked.stdout.split() == said, looked.stderr
    absent = ("tinsmith://absent/sampler_weights/x", "absent")
    looked = run("-c", LOOK, *absent, environment=outside.environment("bob"))
    assert looked.stdout.split() == NOTHING, looked.stderr


def test_who_has_no_key_or_knows_no_authority_gets_nothing(outside: Outside) -> None:
    """Both are said at once, and in words."""
    without_key = outside.runs(outside.environment())
    assert without_key.returncode
    assert "key" in without_key.stderr
    without_ca = outside.runs(outside.environment("alice", ca=False))
    assert without_ca.returncode
    assert "certificate" in without_ca.stderr.lower()
    url = f"https://{outside.node}:30080"
    context = ssl.create_default_context(cafile=str(outside.ca))
    with urllib.request.urlopen(f"{url}/healthz", context=context, timeout=30) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/v1/models", context=context, timeout=30)
    request = urllib.request.Request(f"{url}/v1/models")
    request.add_header("Authorization", f"Bearer {outside.keys['alice']}")
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        assert BASE_MODEL in answer.read().decode()


def test_applying_again_changes_nothing(outside: Outside) -> None:
    """What is stored is what would be sent: apply says so of all, and diff nothing at all."""
    said = [line.rsplit(" ", 1)[1] for line in outside.cluster.apply().splitlines()]
    assert set(said) == {"unchanged"}
    assert outside.cluster.diff() == ""


def steps_of(lines: Lines) -> int:
    """How many steps a program has done."""
    return sum("step" in line for line in lines)


def numbers_of(lines: Lines) -> Lines:
    """What two runs of as many steps must have in common."""
    return [{k: v for k, v in line.items() if k != "draws"} for line in without_names(lines)]


def go_on(programs: Sequence[Program]) -> None:
    """Wait until each of them has made a few steps more."""
    for program in programs:
        enough = steps_of(program.lines) + BETWEEN_STEPS
        program.until(lambda lines, enough=enough: steps_of(lines) >= enough)


def roll_everything(outside: Outside, programs: Sequence[Program]) -> str:
    """Restart all pods while the programs are at work; says what it took and what they did."""
    before = {name: outside.cluster.pods(name) for name in EVERYTHING}
    done, began_s = [steps_of(program.lines) for program in programs], time.monotonic()
    outside.restart_everything()
    outside.cluster.wait_ready(*EVERYTHING)
    took_s = time.monotonic() - began_s
    for name in EVERYTHING:
        assert not set(before[name].values()) & set(outside.cluster.pods(name).values()), name
    made = [steps_of(program.lines) - was for program, was in zip(programs, done, strict=True)]
    return f"{took_s:.0f} s, {' and '.join(map(str, made))} steps meanwhile"


@pytest.mark.timeout(2400)
def test_everything_is_rolled_again_and_again_while_two_tenants_work(
    outside: Outside, capsys: pytest.CaptureFixture[str]
) -> None:
    """By key and TLS, all at once: no call fails, no step is lost or made twice, and every number
    and every token is that of a run alone to which nothing happened."""
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(PodLogs(outside.cluster, outside.logs))
        programs = {name: stack.enter_context(outside.tenant(name)) for name in SEEDS}
        for number in range(ROLLOUTS):
            go_on(list(programs.values()))
            logs.follow(EVERYTHING)
            took = roll_everything(outside, list(programs.values()))
            with capsys.disabled():
                print(f"\nrollout {number + 1} of everything: {took}", end="", flush=True)
        go_on(list(programs.values()))
        for program in programs.values():
            program.tell()
        said = {name: program.end() for name, program in programs.items()}
    for name, lines in said.items():
        steps, drawn = steps_of(lines), len(lines[-1]["drawn"])
        assert lines[-1]["step_count"] == steps, name
        began_s = time.monotonic()
        with outside.tenant(name, steps, drawn) as program:
            alone = program.end()
        differ = [
            pair
            for pair in zip(numbers_of(lines), numbers_of(alone), strict=True)
            if pair[0] != pair[1]
        ]
        assert not differ, f"{name}: {len(differ)} lines differ from those alone: {differ[0]}"
        with capsys.disabled():
            took_s = time.monotonic() - began_s
            print(f"\n{name}: {steps} steps, {drawn} draws; the same alone in {took_s:.0f} s")


def test_the_logs_have_no_traceback(outside: Outside) -> None:
    """After all that: what an operator reads is sentences, of the pods that went, too."""
    said = {file.name: file.read_text() for file in outside.logs.iterdir()}
    for name in EVERYTHING:
        said |= {pod: outside.cluster("logs", pod) for pod in outside.cluster.pods(name)}
    assert all(said.values()), {pod: len(text) for pod, text in said.items()}
    found = {pod: text for pod, text in said.items() if "Traceback" in text}
    assert not found, "\n".join(f"{pod}: {text}" for pod, text in found.items())
