"""The manifests of deploy/: rendered, searched and checked."""

import copy
import functools
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kube.cluster import kubectl
from tinsmith.v1 import checkpoint_service_pb2, sampler_service_pb2, training_service_pb2
from tinsmithd.config import Config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONFIG_FILE = DEPLOY / "base" / "config.toml"
KUBERNETES_VERSIONS = ("1.25", "1.32", "1.37")
SERVERS = {
    "training": (training_service_pb2, "TrainingService"),
    "sampler": (sampler_service_pb2, "SamplerService"),
    "checkpoint": (checkpoint_service_pb2, "CheckpointService"),
}
WORKLOADS = (*SERVERS, "trainer", "gateway")
WRITER = "base-models-writer"
OVERLAYS = ("cpu", "gpu", "gpu-nodes", "example")
"""Those for users."""
Manifest = dict[str, Any]


def render(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    return copy.deepcopy(_rendered(DEPLOY / "overlays" / overlay))


@functools.cache
def _rendered(folder: Path) -> list[Manifest]:
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def render_with(overlay: str, components: Sequence[str], folder: Path) -> list[Manifest]:
    """An overlay with further components, as somebody's own overlay in an empty folder."""
    deploy = Path(os.path.relpath(DEPLOY, folder.resolve()))
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(deploy / "overlays" / overlay)],
        "components": [str(deploy / "components" / each) for each in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return _rendered(folder)


def files_of_base() -> list[Path]:
    """The manifests of base."""
    return sorted(p for p in DEPLOY.glob("base/*.yaml") if p.name != "kustomization.yaml")


def manifests_of_base() -> list[Manifest]:
    """All documents of the folder base."""
    return [m for path in files_of_base() for m in yaml.safe_load_all(path.read_text())]


def find(manifests: Sequence[Manifest], kinds: str, name: str) -> Manifest:
    """The one manifest of these kinds (`Deployment|StatefulSet`) and name."""
    found = [
        m for m in manifests if m["kind"] in kinds.split("|") and m["metadata"]["name"] == name
    ]
    assert len(found) == 1, f"{kinds}/{name}: {len(found)}"
    return found[0]


def pod_of(manifests: Sequence[Manifest], name: str) -> Manifest:
    """Pod spec of a server or of the ranks."""
    spec: Manifest = find(manifests, "Deployment|StatefulSet", name)["spec"]["template"]["spec"]
    return spec


def container_of(manifests: Sequence[Manifest], name: str) -> Manifest:
    """The only container of such a pod."""
    (container,) = pod_of(manifests, name)["containers"]
    assert container["name"] == name
    return dict(container)


def ports_of(manifests: Sequence[Manifest], name: str) -> dict[str, int]:
    """The ports that it declares, by name."""
    return {p["name"]: p["containerPort"] for p in container_of(manifests, name)["ports"]}


def environment_of(manifests: Sequence[Manifest], name: str) -> dict[str, str]:
    """The environment of the container of a server or of the ranks; a pod of this name would have
    it, the first of its StatefulSet."""
    container = container_of(manifests, name)
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        begin = source["configMapRef"]["name"]
        for each in manifests:
            if each["kind"] == "ConfigMap" and each["metadata"]["name"] == begin:
                found |= each.get("data") or {}
    return found | {entry["name"]: _value(entry, name) for entry in container.get("env", [])}


def _value(entry: Manifest, name: str) -> str:
    if "value" in entry:
        return str(entry["value"])
    if "secretKeyRef" in entry["valueFrom"]:
        return secrets.token_hex(32)  # as docs/deploy.md makes them
    assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    return f"{name}-0"


def load(cls: type[Config], env: Mapping[str, str]) -> Config:
    """The settings of a process, from the file in deploy/ and its environment."""
    return cls.load([], {**env, "TINSMITH_CONFIG": str(CONFIG_FILE)})


def check_schema(manifests: Sequence[Manifest], version: str) -> None:
    """Fail for what this Kubernetes version would refuse or ignore."""
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            name = f"{manifest['kind']}/{manifest['metadata']['name']}"
            pytest.fail(f"{name} at {version}: {error.message} at {list(error.path)}")
