"""What pods say until their end, kept beyond it."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

from kube.cluster import KubeCluster


class PodLogs:
    """Follows the logs of pods into files; a context manager that ends it.

    Args:
        cluster: Where the pods are.
        folder: A file for each pod, of its name and when it was made.
    """

    def __init__(self, cluster: KubeCluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._following: list[subprocess.Popen[bytes]] = []

    def follow(self, names: Iterable[str]) -> None:
        """Follow all pods of these servers from their beginning, those that are followed aside."""
        for name in names:
            for pod, made in self._cluster.pods(name).items():
                file = self._folder / f"{pod}-{made.replace(':', '')}.log"
                if not file.exists():
                    command = [*self._cluster.command, "logs", "--follow", pod]
                    with file.open("wb") as said:
                        process = subprocess.Popen(command, stdout=said, stderr=said)
                    self._following.append(process)

    def __enter__(self) -> "PodLogs":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._following:
            process.kill()  # of no effect on one that has ended
            process.wait()
