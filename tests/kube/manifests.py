"""The manifests of deploy/: rendered, searched and checked."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kube.cluster import kubectl
from tinsmith.v1 import checkpoint_service_pb2, sampler_service_pb2, training_service_pb2
from tinsmithd.config import (
    Config,
)

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
Manifest = dict[str, Any]


def render(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = [kubectl(), "kustomize", str(DEPLOY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def files_of_base() -> list[Path]:
    """The manifests of base, and those beside it."""
    files = [path for path in DEPLOY.glob("base/*.yaml") if path.name != "kustomization.yaml"]
    return [
        *sorted(files),
        DEPLOY / "base-models-writer.yaml",
        DEPLOY / "disruption-budget" / "sampler.yaml",
    ]


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


def environment_of(container: Manifest) -> dict[str, str]:
    """Its environment; a pod of this name would have it, the first of its StatefulSet."""
    first = f"{container['name']}-0"
    return {entry["name"]: entry.get("value", first) for entry in container.get("env", [])}


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
