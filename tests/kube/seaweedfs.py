"""What the component seaweedfs needs: identities, what opens the store, and a bucket."""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from kube.cluster import KubeCluster

ENDPOINT = "http://seaweedfs:8333"
BUCKET = "tinsmith"
"""As the component s3 names it."""
NAME = "deployment/seaweedfs"
MAKE = """
import time, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:8888/buckets/%s/", method="POST")
for _ in range(600):
    try:
        urllib.request.urlopen(request, timeout=5).close()
        break
    except urllib.error.HTTPError as error:
        if error.code == 409:
            break  # it is there
    except OSError:
        pass
    time.sleep(0.1)
else:
    raise SystemExit("no bucket could be made")
"""


def files(folder: Path) -> Sequence[Path]:
    """The files of the Secret tinsmith-store, with a key that nobody else has."""
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    identity = {
        "name": "tinsmith",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    options = {"endpoint": ENDPOINT, "region": "us-east-1"}
    options |= {"access_key_id": key, "secret_access_key": secret}
    made = {"s3.json": {"identities": [identity]}, "options.json": options}
    for name, content in made.items():
        (folder / name).write_text(json.dumps(content))
    return [folder / name for name in made]


def make_bucket(cluster: KubeCluster) -> None:
    """Make the bucket, which is a folder of SeaweedFS's file system."""
    cluster("rollout", "status", NAME, "--timeout=120s")
    cluster("exec", NAME, "--", "python", "-c", MAKE % BUCKET)
