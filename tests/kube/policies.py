"""What the NetworkPolicies of deploy/ let through, worked out as a network plugin would."""

from collections.abc import Mapping, Sequence
from typing import Any

from kube.manifests import Manifest

Labels = Mapping[str, str]


def labels_of(name: str) -> Labels:
    """The labels of a pod of deploy/."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "tinsmith"}


def selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    """Whether a label selector selects a pod with these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        wanted &= labels.get(each["key"]) in each["values"]
    return bool(wanted)


def lets_through(
    manifests: Sequence[Manifest], source: Labels | None, target: Labels | None, port: int
) -> bool:
    """Whether a connection over TCP comes about: the source may open it, and the target take it.

    Args:
        manifests: All that is applied.
        source: Labels of the pod that opens it; None is a pod of another namespace.
        target: Labels of the pod that is called; None likewise.
        port: Of the target.
    """
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    return _one_way(policies, "Egress", source, target, port) and _one_way(
        policies, "Ingress", target, source, port
    )


def _one_way(
    policies: Sequence[Mapping[str, Any]],
    kind: str,
    own: Labels | None,
    peer: Labels | None,
    port: int,
) -> bool:
    if own is None:
        return True  # no policy here is about it
    ours = [p for p in policies if kind in p["policyTypes"] and selects(p["podSelector"], own)]
    rules = [rule for policy in ours for rule in policy.get(kind.lower(), [])]
    end = "to" if kind == "Egress" else "from"
    return not ours or any(
        _names(rule.get(end), peer) and _has(rule.get("ports"), port) for rule in rules
    )


def _names(peers: Sequence[Mapping[str, Any]] | None, pod: Labels | None) -> bool:
    if not peers:
        return True
    for peer in peers:
        if peer.get("namespaceSelector", {}):
            raise NotImplementedError(peer)
        if peer == {"namespaceSelector": {}}:
            return True
        if pod is not None and "podSelector" in peer and selects(peer["podSelector"], pod):
            return True
    return False


def _has(ports: Sequence[Mapping[str, Any]] | None, port: int) -> bool:
    return not ports or any(p["port"] == port and p["protocol"] == "TCP" for p in ports)
