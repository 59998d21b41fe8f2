"""deploy/: the gateway's own manifests; `test_deploy.py` has what all processes share."""

import pytest

from kube.manifests import (
    Manifest,
    container_of,
    environment_of,
    find,
    load,
    manifests_of_base,
    pod_of,
    ports_of,
    render,
)
from tinsmithd.config import GatewaySettings, SamplerConfig


@pytest.fixture(params=["base", "gpu"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """base as it stands in its files, and an overlay as rendered."""
    return manifests_of_base() if request.param == "base" else render(request.param)


def test_the_gateway_is_reached_and_reaches_its_cluster(manifests: list[Manifest]) -> None:
    """One port from its settings to its Service, its probes and its policy; metrics beside it."""
    config = load(GatewaySettings, environment_of(manifests, "gateway"))
    assert isinstance(config, GatewaySettings)
    declared = ports_of(manifests, "gateway")
    assert config.listen_address == f"0.0.0.0:{declared['http']}"
    assert config.metrics_address == f"0.0.0.0:{declared['metrics']}"
    service = find(manifests, "Service", "gateway")["spec"]
    (port,) = service["ports"]
    assert (port["port"], port["targetPort"]) == (declared["http"], "http")
    template = find(manifests, "Deployment", "gateway")["spec"]["template"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(declared["metrics"])
    for probe in ("livenessProbe", "readinessProbe"):
        asked = container_of(manifests, "gateway")[probe]["httpGet"]
        assert asked == {"path": "/livez", "port": "http"}
    policy = find(manifests, "NetworkPolicy", "tinsmith-gateway")["spec"]
    calls, scrapes = policy["ingress"]
    assert (calls["from"], scrapes["from"]) == ([{"podSelector": {}}], [{"namespaceSelector": {}}])
    assert [p["port"] for p in calls["ports"]] == [declared["http"]]
    assert [p["port"] for p in scrapes["ports"]] == [declared["metrics"]]
    (grpc,) = [
        p for p in find(manifests, "Service", "training")["spec"]["ports"] if p["name"] == "grpc"
    ]
    assert config.training_address == f"training:{grpc['port']}"
    sampler = load(SamplerConfig, environment_of(manifests, "sampler"))
    assert isinstance(sampler, SamplerConfig)
    served = sampler.base_model.rpartition("/")[2]
    assert set(config.base_models.values()) == {served}, "an alias of what is there"
    pod = pod_of(manifests, "gateway")
    assert pod["terminationGracePeriodSeconds"] > config.stop_grace_s + 10
