"""deploy/: the manifests, the settings in them, and the Dockerfiles."""

import subprocess
from collections.abc import Iterator

import pytest
import yaml

from kube.cluster import fresh_namespace
from kube.manifests import (
    DEPLOY,
    KUBERNETES_VERSIONS,
    OVERLAYS,
    ROOT,
    SERVERS,
    WORKLOADS,
    WRITER,
    Manifest,
    check_schema,
    container_of,
    environment_of,
    files_of_base,
    find,
    load,
    manifests_of_base,
    pod_of,
    ports_of,
    render,
)
from kube.policies import labels_of, selects
from tinsmithd.config import (
    SECTIONS,
    CheckpointConfig,
    SamplerConfig,
    ServerConfig,
    TrainerConfig,
    TrainingConfig,
)
from tinsmithd.rpc import probe
from tinsmithd.trainer.process_group import nodes


@pytest.fixture(params=["base", *OVERLAYS])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """base as it stands in its files, and the overlays for users as rendered."""
    return manifests_of_base() if request.param == "base" else render(request.param)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_manifests_fit_the_schema(manifests: list[Manifest], version: str) -> None:
    """Every manifest is valid, with no field that this Kubernetes version does not know."""
    check_schema(manifests, version)


def test_base_lists_every_file() -> None:
    """No manifest is forgotten in the kustomization."""
    listed = yaml.safe_load((DEPLOY / "base" / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [p.name for p in files_of_base() if p.parent.name == "base"]


@pytest.mark.parametrize("overlay", [*OVERLAYS, "ci", "ci-nodes"])
def test_the_namespace_is_the_users_choice(overlay: str) -> None:
    """No manifest names one, but in the example, where all are in the same."""
    found = {m["metadata"].get("namespace") for m in render(overlay)}
    assert found == ({"tinsmith"} if overlay == "example" else {None})


@pytest.mark.parametrize("name", WORKLOADS)
def test_process_starts_with_its_settings(manifests: list[Manifest], name: str) -> None:
    """config.toml and the environment of the container load, with no unknown key."""
    container = container_of(manifests, name)
    env = environment_of(manifests, name)
    assert env["TINSMITH_CONFIG"] == "/etc/tinsmith/config.toml"
    assert any(m["mountPath"] == "/etc/tinsmith" for m in container["volumeMounts"])
    config = load(SECTIONS[name], env)
    if isinstance(config, ServerConfig):
        grace_s = pod_of(manifests, name)["terminationGracePeriodSeconds"]
        assert grace_s > config.stop_grace_s + 10


def test_ranks_and_sampler_hold_the_same_base_model(manifests: list[Manifest]) -> None:
    """An adapter that is trained on one base model is sampled on the same one."""
    trainer = load(TrainerConfig, environment_of(manifests, "trainer"))
    sampler = load(SamplerConfig, environment_of(manifests, "sampler"))
    assert isinstance(trainer, TrainerConfig)
    assert isinstance(sampler, SamplerConfig)
    assert (trainer.base_model, trainer.dtype) == (sampler.base_model, sampler.dtype)
    for name, config in (("trainer", trainer), ("sampler", sampler)):
        mounts = container_of(manifests, name)["volumeMounts"]
        (mount,) = [m for m in mounts if m["name"] == "base-models"]
        assert mount["readOnly"]
        assert config.base_model.startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize("name", ["training", "checkpoint"])
def test_data_are_on_the_claimed_volume(manifests: list[Manifest], name: str) -> None:
    """Journal and checkpoints are written below the mount of a volumeClaimTemplate."""
    config = load(SECTIONS[name], {})
    assert isinstance(config, TrainingConfig | CheckpointConfig)
    spec = find(manifests, "StatefulSet", name)["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    mounts = container_of(manifests, name)["volumeMounts"]
    (mount,) = [m for m in mounts if m["name"] == claim["metadata"]["name"]]
    assert config.data_folder.startswith(mount["mountPath"] + "/")
    assert spec["replicas"] == 1


def test_who_mounts_one_volume_runs_where_it_is(manifests: list[Manifest]) -> None:
    """The claim of base models is of one node, and so are its pods, or it is of many."""
    modes = find(manifests, "PersistentVolumeClaim", "base-models")["spec"]["accessModes"]
    mounting = ["trainer", "sampler", WRITER]
    terms = [pod_of(manifests, name).get("affinity", {}).get("podAffinity") for name in mounting]
    if modes == ["ReadWriteMany"]:
        assert terms == [None, None, None]
        return
    assert modes == ["ReadWriteOnce"]
    if not any("tinsmith-parameters-" in m["metadata"]["name"] for m in manifests):
        return  # base alone is applied by nobody
    for found in terms:
        (term,) = found["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        chosen = [n for n in (*WORKLOADS, WRITER) if selects(term["labelSelector"], labels_of(n))]
        assert sorted(chosen) == sorted(mounting)


def test_the_writer_of_base_models_waits_until_it_is_needed(manifests: list[Manifest]) -> None:
    """It has no pod, an image that the overlay names, and may write where the others only read."""
    spec = find(manifests, "StatefulSet", WRITER)["spec"]
    assert spec["replicas"] == 0
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == container_of(manifests, "checkpoint")["image"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "base-models"]
    assert not mount.get("readOnly")
    assert mount["mountPath"] == "/models"


@pytest.mark.parametrize("name", SERVERS)
def test_probes_name_the_service_of_the_contract(manifests: list[Manifest], name: str) -> None:
    """Liveness asks for the process, readiness for the service, on the port that it listens on."""
    module, service = SERVERS[name]
    full_name = module.DESCRIPTOR.services_by_name[service].full_name
    container = container_of(manifests, name)
    config = load(SECTIONS[name], environment_of(manifests, name))
    assert isinstance(config, ServerConfig)
    host, _, port = config.listen_address.rpartition(":")
    assert host == "0.0.0.0"
    assert ports_of(manifests, name)["grpc"] == int(port)
    alive, ready = container["livenessProbe"]["grpc"], container["readinessProbe"]["grpc"]
    assert (alive["port"], alive.get("service", "")) == (int(port), "")
    assert (ready["port"], ready["service"]) == (int(port), full_name)
    if name == "sampler":
        start = container["startupProbe"]
        assert (start["grpc"]["port"], start["grpc"]["service"]) == (int(port), full_name)
        assert start["periodSeconds"] * start["failureThreshold"] >= 1800


@pytest.mark.parametrize("name", ["training", "trainer"])
def test_no_secret_of_the_rank_link_is_in_the_manifests(
    manifests: list[Manifest], name: str
) -> None:
    """Both ends mount one that the user makes, where their settings look for it."""
    config = load(SECTIONS[name], environment_of(manifests, name))
    assert isinstance(config, TrainingConfig | TrainerConfig)
    (mount,) = [m for m in container_of(manifests, name)["volumeMounts"] if m["name"] == "link"]
    (volume,) = [v for v in pod_of(manifests, name)["volumes"] if v["name"] == "link"]
    assert mount["readOnly"]
    assert config.link_secret_file == f"{mount['mountPath']}/secret"
    assert volume["secret"]["secretName"] == "tinsmith-link"
    assert volume["secret"]["defaultMode"] & 0o007 == 0
    assert "Secret" not in {m["kind"] for m in manifests}
    assert "create secret generic tinsmith-link" in (ROOT / "docs" / "deploy.md").read_text()


@pytest.mark.parametrize("name", SERVERS)
def test_prometheus_finds_the_metrics(manifests: list[Manifest], name: str) -> None:
    """Annotations, declared port and settings name one port."""
    settings = load(SECTIONS[name], environment_of(manifests, name))
    assert isinstance(settings, ServerConfig)
    port = ports_of(manifests, name)["metrics"]
    assert settings.metrics_address == f"0.0.0.0:{port}"
    template = find(manifests, "Deployment|StatefulSet", name)["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port),
    }


@pytest.mark.parametrize("name", SERVERS)
def test_service_reaches_its_server(manifests: list[Manifest], name: str) -> None:
    """Selector, port and port name lead to the pods of that server and to no others."""
    spec = find(manifests, "Service", name)["spec"]
    declared = ports_of(manifests, name)
    for port in spec["ports"]:
        assert port["targetPort"] == port["name"]
        assert port["port"] == declared[port["name"]]
    names = [port["name"] for port in spec["ports"]]
    assert names == (["grpc", "link"] if name == "training" else ["grpc"])
    chosen = [
        m["metadata"]["name"]
        for m in manifests
        if m["kind"] in ("Deployment", "StatefulSet")
        and spec["selector"].items() <= m["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert chosen == [name]


def test_addresses_in_settings_are_services(manifests: list[Manifest]) -> None:
    """What the processes and the clients are told to dial are Services with that port."""
    training = load(TrainingConfig, {})
    sampler = load(SamplerConfig, {})
    trainer = load(TrainerConfig, environment_of(manifests, "trainer"))
    assert isinstance(training, TrainingConfig)
    assert isinstance(sampler, SamplerConfig)
    assert isinstance(trainer, TrainerConfig)
    dialled = {
        training.sampler_address: "sampler",
        training.checkpoint_address: "checkpoint",
        training.checkpoint_target: "checkpoint",
        sampler.checkpoint_target: "checkpoint",
    }
    for address, name in dialled.items():
        (port,) = [
            p for p in find(manifests, "Service", name)["spec"]["ports"] if p["name"] == "grpc"
        ]
        assert address == f"{name}:{port['port']}"
    link = ports_of(manifests, "training")["link"]
    assert trainer.training_target == f"training:{link}"
    assert training.link_address == f"0.0.0.0:{link}"
    assert training.spawn_ranks == 0


def test_ranks_reach_a_training_server_that_is_not_ready(manifests: list[Manifest]) -> None:
    """It is ready once ranks are attached, so its Service must lead to it before that."""
    assert find(manifests, "Service", "training")["spec"]["publishNotReadyAddresses"]


@pytest.mark.parametrize("name", ["sampler", "checkpoint"])
def test_service_is_headless(manifests: list[Manifest], name: str) -> None:
    """Calls of one channel can spread over pods; a StatefulSet's pods have names."""
    assert find(manifests, "Service", name)["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("name", [*WORKLOADS, WRITER])
def test_pod_has_no_rights(manifests: list[Manifest], name: str) -> None:
    """The restricted pod security standard, a read-only root file system and no token."""
    pod, container = pod_of(manifests, name), container_of(manifests, name)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]


def test_there_is_never_a_second_one(manifests: list[Manifest]) -> None:
    """The pod of a StatefulSet is replaced, not rolled; there are no more ranks than one group."""
    assert find(manifests, "StatefulSet", "training")["spec"]["replicas"] == 1
    ranks = load(TrainerConfig, environment_of(manifests, "trainer"))
    assert isinstance(ranks, TrainerConfig)
    assert find(manifests, "StatefulSet", "trainer")["spec"]["replicas"] == ranks.nodes


def test_machines_of_a_rank_group_meet(manifests: list[Manifest]) -> None:
    """The pods know the first of them by the name that the headless Service gives it, before it is
    ready, and start together."""
    spec = find(manifests, "StatefulSet", "trainer")["spec"]
    config = load(TrainerConfig, environment_of(manifests, "trainer"))
    assert isinstance(config, TrainerConfig)
    assert (config.node, config.restart) == ("trainer-0", True)
    place = nodes.place(2, "trainer-3", 1, config.meet_address)
    assert (
        place.address == f"trainer-2.{spec['serviceName']}:{ports_of(manifests, 'trainer')['meet']}"
    )
    assert spec["podManagementPolicy"] == "Parallel"
    service = find(manifests, "Service", spec["serviceName"])["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]


def test_the_number_of_gpus_stands_in_one_place() -> None:
    """A pod has as many ranks as it has GPUs."""
    manifests = render("gpu")
    limits = container_of(manifests, "trainer")["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) > 0
    config = load(TrainerConfig, environment_of(manifests, "trainer"))
    assert isinstance(config, TrainerConfig)
    assert (config.ranks, config.training_target) == (0, "training:50054")


@pytest.mark.parametrize("name", ["sampler", "gateway"])
def test_budget_covers_those_of_which_there_may_be_many(name: str) -> None:
    """A PodDisruptionBudget selects the pods, and lets one of them go."""
    for overlay in OVERLAYS:
        manifests = render(overlay)
        budget = find(manifests, "PodDisruptionBudget", name)["spec"]
        template = find(manifests, "Deployment", name)["spec"]["template"]
        assert budget["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert budget["maxUnavailable"] == 1


def test_ci_overlay_has_nothing_that_1_20_lacks() -> None:
    """No gRPC probe is left and no PodDisruptionBudget; each server's probes ask its health by a
    command, about what gRPC probes ask."""
    manifests = render("ci")
    assert "PodDisruptionBudget" not in {m["kind"] for m in manifests}
    for name in SERVERS:
        before, after = container_of(manifests_of_base(), name), container_of(manifests, name)
        for which in ("livenessProbe", "readinessProbe", "startupProbe"):
            if which not in before:
                assert which not in after
                continue
            asked = before[which]["grpc"]
            command = ["python", "-P", "-m", probe.__name__, f"127.0.0.1:{asked['port']}"]
            command += [asked["service"]] if "service" in asked else []
            assert after[which]["exec"] == {"command": command}
            assert not after[which].keys() & {"grpc", "tcpSocket", "httpGet"}
            assert after[which]["timeoutSeconds"] > probe.ANSWER_S_MAX


@pytest.fixture
def namespace() -> Iterator[list[str]]:
    """kubectl with a fresh namespace on the API server that TINSMITH_TEST_KUBECONFIG names."""
    with fresh_namespace("tinsmith-test") as cluster:
        yield cluster.command


def test_apply_twice(namespace: list[str]) -> None:
    """A real API server takes the ci overlay, and a second apply changes nothing that is stored."""
    command = [*namespace, "apply", "-k", str(DEPLOY / "overlays" / "ci")]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert {line.rsplit(" ", 1)[1] for line in first.stdout.splitlines()} == {"created"}
    objects = dict(line.rsplit(" ", 1) for line in second.stdout.splitlines())
    assert len(objects) == len(render("ci"))
    assert set(objects.values()) == {"unchanged"}, second.stdout
    diff = subprocess.run(
        [*namespace, "diff", "-k", command[-1]], capture_output=True, text=True, timeout=120
    )
    assert (diff.returncode, diff.stdout) == (0, ""), diff.stdout + diff.stderr
