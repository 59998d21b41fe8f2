"""deploy/overlays/ci on a Kubernetes that is there, and scripts in a pod of it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLIENT = "client"
"""The pod in which scripts run; its image is a server's, which has the client in it."""
SCRIPT = Path(__file__).with_name("worker.py")
STEP_S_MAX = 240.0
"""A step may have to wait for pods to start again."""


def kubectl_command(kubeconfig: str) -> list[str]:
    """kubectl for an API server."""
    given = os.environ.get("TINSMITH_KUBECTL", "kubectl")
    return [shutil.which(given) or given, f"--kubeconfig={kubeconfig}"]


class KubeCluster:
    """One namespace with everything in it.

    Args:
        kubeconfig: File that names the API server. Its nodes have the images of the ci overlay.
        namespace: Is made, and deleted by `delete`.
    """

    def __init__(self, kubeconfig: str, namespace: str) -> None:
        self._command = kubectl_command(kubeconfig)
        self._namespace = namespace
        self("create", "namespace", namespace)

    def __call__(self, *arguments: str, text: str | None = None, timeout_s: float = 120) -> str:
        """Run kubectl in the namespace; returns what it printed."""
        done = subprocess.run(
            [*self._command, f"--namespace={self._namespace}", *arguments],
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
        """The steps of docs/deploy.md: apply, fill the volume of base models, restart."""
        self.apply()
        (writer,) = yaml.safe_load_all((DEPLOY / "base-models-writer.yaml").read_text())
        (container,) = writer["spec"]["containers"]
        container["image"] = self.image("checkpoint")  # no registry here has the image named there
        name = self._start(writer)
        self("cp", str(base_model), f"{name}:/models/{base_model.name}")
        self("delete", "pod", name)
        # As in the text: those that started before the files were there may have given up.
        self("rollout", "restart", "deployment/trainer", "deployment/sampler")
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

    def pods(self, name: str) -> list[str]:
        """Names of the pods of a server, or of the ranks, that are not ending."""
        found = json.loads(
            self("get", "pods", f"--selector=app.kubernetes.io/name={name}", "-ojson")
        )
        return [
            item["metadata"]["name"]
            for item in found["items"]
            if "deletionTimestamp" not in item["metadata"]
        ]

    def kill(self, *names: str) -> None:
        """End all pods of servers, or of the ranks, without a word of warning."""
        pods = [pod for name in names for pod in self.pods(name)]
        self("delete", "pod", *pods, "--force", "--grace-period=0")

    def start_times(self, name: str) -> list[str]:
        """When the pods of a server, or of the ranks, were made."""
        selector = f"--selector=app.kubernetes.io/name={name}"
        path = "{.items[*].metadata.creationTimestamp}"
        return self("get", "pods", selector, f"--output=jsonpath={path}").split()

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
                command = [*self._command, f"--namespace={self._namespace}", "port-forward"]
                process = stack.enter_context(
                    subprocess.Popen(
                        [*command, f"service/{service}", f":{port}"],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
                stack.callback(process.kill)
                line = process.stdout.readline() if process.stdout else ""
                found[variable] = line.split()[2]  # Forwarding from ADDRESS -> PORT
            yield found

    def until(self, what: str, true: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait for something."""
        end_s = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s\n{self('get', 'pods')}")
            time.sleep(1)

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
        inside = [*self._command, f"--namespace={self._namespace}", "exec", CLIENT, "--"]
        command = [*inside, "python", "/tmp/worker.py"]
        if here is not None:
            command = [sys.executable, str(SCRIPT)]
        process = subprocess.Popen(
            [*command, str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=here,
        )
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        reader.start()
        watch = _Watchdog(process, STEP_S_MAX)
        lines = []
        try:
            for line in process.stdout or ():
                watch.calm()
                lines.append(json.loads(line))
                if at and (action := at.get(lines[-1].get("step", -1))):
                    action()
        finally:
            watch.stop()
            status = process.wait()
            reader.join()
        if status:
            raise RuntimeError(f"the script ended with {status}: {''.join(said)}")
        return lines


class _Watchdog:
    """Ends a process that has not said anything for some time."""

    def __init__(self, process: "subprocess.Popen[str]", silence_s: float) -> None:
        self._process = process
        self._silence_s = silence_s
        self._timer: threading.Timer | None = None
        self.calm()

    def calm(self) -> None:
        self.stop()
        self._timer = threading.Timer(self._silence_s, self._process.kill)
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def without_names(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the script must have in common: all but the model's id."""
    return [{k: v for k, v in line.items() if k != "model_id"} for line in lines]
