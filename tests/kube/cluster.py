"""deploy/overlays/ci on a Kubernetes that is there, and scripts in a pod of it."""

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
    try:
        yield cluster
    finally:
        cluster.delete()


class KubeCluster:
    """One namespace with everything in it.

    Args:
        command: kubectl for an API server. To `deploy`, its nodes have the ci overlay's images.
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
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def delete(self) -> None:
        """Delete the namespace, without waiting for its end."""
        self("delete", "namespace", self._namespace, "--wait=false")

    def deploy(self, base_model: Path) -> None:
        """The steps of docs/deploy.md: secret, apply, fill the volume of base models, restart."""
        secret = f"--from-literal=secret={secrets.token_hex(32)}"
        self("create", "secret", "generic", "tinsmith-link", secret)
        self.apply()
        (writer,) = yaml.safe_load_all((DEPLOY / "base-models-writer.yaml").read_text())
        (container,) = writer["spec"]["containers"]
        container["image"] = self.image("checkpoint")  # no registry here has the image named there
        name = self._start(writer)
        self("cp", str(base_model), f"{name}:/models/{base_model.name}")
        self("delete", "pod", name)
        # As in the text: those that started before the files were there may have given up.
        self("rollout", "restart", "statefulset/trainer", "deployment/sampler")
        container["name"], writer["metadata"]["name"] = CLIENT, CLIENT
        container["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
        container["env"] = [{"name": "TINSMITH_ADDRESS", "value": "training:50051"}]
        writer["spec"]["volumes"] = [{"name": "tmp", "emptyDir": {}}]
        self._start(writer)
        write = ("exec", "-i", CLIENT, "--", "sh", "-c", "cat > /tmp/worker.py")
        self(*write, text=SCRIPT.read_text())

    def apply(self) -> None:
        """Apply the overlay."""
        self("apply", "-k", str(DEPLOY / "overlays" / "ci"))

    def _start(self, pod: Mapping[str, Any]) -> str:
        name: str = pod["metadata"]["name"]
        self("apply", "-f", "-", text=yaml.safe_dump(dict(pod)))
        self("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s")
        return name

    def image(self, server: str) -> str:
        """Image of a server's only container."""
        kind = "statefulset" if server in ("training", "checkpoint") else "deployment"
        path = "{.spec.template.spec.containers[0].image}"
        return self("get", f"{kind}/{server}", f"--output=jsonpath={path}")

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

    def kill(self, *names: str) -> None:
        """End all pods of servers, or of the ranks, without a word of warning."""
        pods = [pod for name in names for pod in self.pods(name)]
        self("delete", "pod", *pods, "--force", "--grace-period=0")

    @contextlib.contextmanager
    def forwarded(self) -> Iterator[dict[str, str]]:
        """The three ports on this machine's loopback: the environment of a client."""
        variables = {
            "TINSMITH_ADDRESS": ("training", 50051),
            "TINSMITH_ADDRESS_SAMPLER": ("sampler", 50052),
            "TINSMITH_ADDRESS_CHECKPOINT": ("checkpoint", 50053),
        }
        with contextlib.ExitStack() as stack:
            found = dict(os.environ)
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


def without_names(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the script must have in common: all but the model's id."""
    return [{k: v for k, v in line.items() if k != "model_id"} for line in lines]
