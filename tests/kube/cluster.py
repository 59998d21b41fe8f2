"""deploy/ on a Kubernetes that is there, and scripts in a pod of it."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLIENT = "client"
"""The pod in which scripts run; its image is a server's, which has the client in it."""
SCRIPT = Path(__file__).with_name("worker.py")
WRITER = "base-models-writer"
BASE_MODEL = "SmolLM2-135M-Instruct"
"""Name of the folder that deploy/base/config.toml names; a tiny random model lies in it here."""
SECRETS = {"tinsmith-link": "secret", "tinsmith-gateway": "signing-key"}
"""What docs/deploy.md has its reader make: names of Secrets, and the key in each."""


def skip_loudly(sentence: str) -> None:
    """Skip, and say so among the warnings at the end of the run too."""
    warnings.warn(sentence, stacklevel=2)
    pytest.skip(sentence)


def kubectl() -> str:
    """The kubectl to use; skips without one."""
    given = os.environ.get("TINSMITH_KUBECTL") or os.environ.get("KUBECTL") or "kubectl"
    found = shutil.which(given)
    if found is None:
        skip_loudly(f"overlays were NOT rendered: no {given} (set TINSMITH_KUBECTL)")
    assert found is not None
    return found


@contextlib.contextmanager
def fresh_namespace(prefix: str) -> "Iterator[KubeCluster]":
    """A namespace on the API server that TINSMITH_TEST_KUBECONFIG names; skips without one."""
    kubeconfig = os.environ.get("TINSMITH_TEST_KUBECONFIG")
    if not kubeconfig:
        skip_loudly("nothing was applied to an API server: TINSMITH_TEST_KUBECONFIG is not set")
    cluster = KubeCluster([kubectl(), f"--kubeconfig={kubeconfig}"], f"{prefix}-{os.getpid()}")
    in_use.append(cluster)
    try:
        yield cluster
    except BaseException as error:
        error.add_note(cluster.state())
        raise
    finally:
        in_use.remove(cluster)
        cluster.delete()


in_use: "list[KubeCluster]" = []
"""Those of the tests that are running; a failed one says how they are."""


class KubeCluster:
    """One namespace with everything in it.

    Args:
        command: kubectl for an API server. To `deploy`, its nodes have the overlay's images.
        namespace: Is made, and deleted by `delete`.

    Attributes:
        command: kubectl in the namespace.
    """

    def __init__(self, command: Sequence[str], namespace: str) -> None:
        self._namespace = namespace
        self.command = [*command, f"--namespace={namespace}"]
        self("create", "namespace", namespace)

    def __call__(self, *arguments: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run kubectl in the namespace; returns what it printed."""
        done = subprocess.run(
            [*self.command, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            said = (done.stdout[-4000:] + done.stderr).strip()
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {said}")
        return done.stdout

    def delete(self) -> None:
        """Delete the namespace, without waiting for its end."""
        self("delete", "namespace", self._namespace, "--wait=false")

    def deploy(
        self,
        base_model: Path,
        overlay: str = "ci",
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """The steps of docs/deploy.md: secrets, apply, fill the volume of base models, restart.

        Args:
            base_model: Its folder.
            overlay: A folder of deploy/overlays.
            prepare: What else is to be done once it is applied.
        """
        self._overlay = DEPLOY / "overlays" / overlay
        for name, key in SECRETS.items():
            drawn = f"--from-literal={key}={secrets.token_hex(32)}"
            self("create", "secret", "generic", name, drawn)
        self.apply()
        prepare()
        self("scale", f"statefulset/{WRITER}", "--replicas=1")
        self("rollout", "status", f"statefulset/{WRITER}", "--timeout=120s")
        self("cp", str(base_model), f"{WRITER}-0:/models/{base_model.name}")
        self("scale", f"statefulset/{WRITER}", "--replicas=0")
        # As in the text: those that started before the files were there may have given up.
        self("rollout", "restart", "statefulset/trainer", "deployment/sampler")
        self("apply", "-f", "-", text=yaml.safe_dump(self._client_pod()))
        self("wait", "--for=condition=Ready", f"pod/{CLIENT}", "--timeout=120s")
        write = ("exec", "-i", CLIENT, "--", "sh", "-c", "cat > /tmp/worker.py")
        self(*write, text=SCRIPT.read_text())

    def secret(self, name: str, *files: Path) -> None:
        """Make a Secret of some files, under their own names."""
        self("create", "secret", "generic", name, *(f"--from-file={file}" for file in files))

    def node_address(self) -> str:
        """The address of a node, at which its ports are."""
        return self("get", "nodes", "--output=jsonpath={.items[0].status.addresses[0].address}")

    def apply(self) -> str:
        """Apply the overlay; returns what kubectl says."""
        return self("apply", "-k", str(self._overlay))

    def diff(self) -> str:
        """How what is stored differs from what would be sent; raises where it does."""
        return self("diff", "-k", str(self._overlay))

    def state(self) -> str:
        """For a failed test: pods, warnings, and what each server said last."""
        everyone = "--selector=app.kubernetes.io/part-of=tinsmith"
        recent = ("--field-selector=type=Warning", "--sort-by=.lastTimestamp")
        asked = (
            ("get", "pods", "--output=wide"),
            ("get", "events", *recent),
            ("logs", everyone, "--tail=8", "--prefix", "--ignore-errors", "--max-log-requests=20"),
        )
        said = [f"namespace {self._namespace}"]
        for command in asked:
            try:
                answer = self(*command, timeout_s=30)
                said.append(f"--- kubectl {' '.join(command)}\n{answer[-8000:]}")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                said.append(str(error))
        return "\n".join(said)

    def _client_pod(self) -> dict[str, Any]:
        """A user's pod: what a server's pod may do, and its image, which has the client in it."""
        found = json.loads(self("get", f"statefulset/{WRITER}", "--output=json"))
        spec = found["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        container |= {
            "name": CLIENT,
            "env": [{"name": "TINSMITH_ADDRESS", "value": "training:50051"}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        spec |= {"volumes": [{"name": "tmp", "emptyDir": {}}], "affinity": None}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": CLIENT}, "spec": spec}

    def wait_ready(self, *names: str) -> None:
        """Wait until all pods of these servers are ready, and none is of before."""
        for name in names:
            self("rollout", "status", f"{kind_of(name)}/{name}", "--timeout=300s", timeout_s=310)

    def pods(self, name: str) -> dict[str, str]:
        """Pods of a server, or of the ranks, that are not ending: when each was made, by name."""
        selector = f"--selector=app.kubernetes.io/name={name}"
        found = json.loads(self("get", "pods", selector, "--output=json"))
        about = [item["metadata"] for item in found["items"]]
        return {
            each["name"]: each["creationTimestamp"]
            for each in about
            if "deletionTimestamp" not in each
        }

    def status_of(self, pod: str) -> dict[str, Any]:
        """What Kubernetes knows of the only container of a pod."""
        (found,) = json.loads(self("get", "pod", pod, "--output=json"))["status"][
            "containerStatuses"
        ]
        return dict(found)

    def restarts(self, pod: str) -> int:
        """How often its container was started again."""
        return int(self.status_of(pod)["restartCount"])

    def kill(self, *names: str) -> None:
        """End all pods of servers, or of the ranks, without a word of warning."""
        pods = [pod for name in names for pod in self.pods(name)]
        self("delete", "pod", *pods, "--force", "--grace-period=0")

    def fetch(self, url: str) -> str:
        """What is there, read by the pod for scripts; bytes that are no text are replaced."""
        script = "print(r.urlopen(sys.argv[1], timeout=30).read().decode(errors='replace'))"
        return self._python(script, url)

    def redirected(self, url: str) -> str:
        """Where an answer says that the thing is, not followed."""
        script = (
            "class Stay(r.HTTPRedirectHandler):\n"
            "    def redirect_request(self, *_): return None\n"
            "try: r.build_opener(Stay).open(sys.argv[1], timeout=30)\n"
            "except r.HTTPError as error: print(error.headers['Location'])"
        )
        return self._python(script, url).strip()

    def _python(self, script: str, *arguments: str) -> str:
        program = f"import sys, urllib.request as r\n{script}"
        return self("exec", CLIENT, "--", "python", "-c", program, *arguments)

    @contextlib.contextmanager
    def forwarded(self) -> Iterator[dict[str, str]]:
        """The three ports on this machine's loopback: the environment of a client."""
        variables = {
            "TINSMITH_ADDRESS": ("training", 50051),
            "TINSMITH_ADDRESS_SAMPLER": ("sampler", 50052),
            "TINSMITH_ADDRESS_CHECKPOINT": ("checkpoint", 50053),
        }
        with contextlib.ExitStack() as stack:
            found = here()
            for variable, (service, port) in variables.items():
                command = [*self.command, "port-forward", f"service/{service}", f":{port}"]
                process = stack.enter_context(
                    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                )
                stack.callback(process.kill)
                line = process.stdout.readline() if process.stdout else ""
                found[variable] = line.split()[2]  # Forwarding from ADDRESS -> PORT
            yield found

    def run_script(
        self,
        steps: int,
        at: Mapping[int, Callable[[], object]] | None = None,
        here: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Run `worker.py` in the pod for scripts; returns its lines.

        Args:
            steps: How many.
            at: What to do when a step is done, by its number.
            here: Run it in a process of this machine instead, in this environment.
        """
        command = [*self.command, "exec", CLIENT, "--", "python", "/tmp/worker.py", str(steps)]
        if here is not None:
            command = [sys.executable, str(SCRIPT), str(steps)]
        lines = []
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, env=here
            )
            try:
                for line in process.stdout or ():
                    lines.append(json.loads(line))
                    if at and (action := at.get(lines[-1].get("step", -1))):
                        action()
                status = process.wait()
            finally:
                process.kill()  # of no effect on one that has ended
                process.wait()
            if status:
                said.seek(0)
                raise RuntimeError(f"the script ended with {status}: {said.read()}")
        return lines


def here() -> dict[str, str]:
    """The environment of a program outside of the cluster: it imports what this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def kind_of(name: str) -> str:
    """The kind of a workload of deploy/."""
    return "deployment" if name in ("sampler", "gateway") else "statefulset"


def without_names(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the script must have in common: all but the model's id."""
    return [{k: v for k, v in line.items() if k != "model_id"} for line in lines]
