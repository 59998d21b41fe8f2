"""`python -m releases.record RELEASE COMMIT`: let the servers of a commit write a recording.

From the root of the repository, with PYTHONPATH=tests. It writes `tests/data/RELEASE`.
"""

import argparse
import tempfile
from pathlib import Path

import tinsmith
from releases import recorded
from releases.code import archived
from releases.mixed import Mixed
from tinsmithd.keys import KeyFile
from tiny_models import write_tiny_model

KINDS = ("checkpoint", "trainer", "training")


def record(release: str, commit: str, folder: Path) -> Path:
    """Record a release; returns the file."""
    base = write_tiny_model(folder / recorded.BASE, num_hidden_layers=1)
    KeyFile(folder / "keys.json").create("alice", note="recorded")
    code = archived(commit, folder / "code")
    with Mixed(base, folder, KINDS, **recorded.SETTINGS) as cluster:
        cluster.start(code)
        at = cluster.addresses["training"]
        service = tinsmith.ServiceClient(base_url=at)
        twin, seen = recorded.trained(service, seed=7)
        after = recorded.rest(twin)
        model, again = recorded.trained(service, seed=7)
        assert seen == again
        path = f"tinsmith://{model.model_id}/weights/kept"
        loaded = recorded.from_checkpoint(twin, path)
        with recorded.Raw(at, model.model_id) as raw:
            seq_id = raw.next_seq_id()
            cluster.member("trainer").kill()
            raw.hand_in(seq_id, recorded.STEPS + 1)
            raw.hand_in(seq_id + 2, recorded.STEPS + 2)
            cluster.kill()
    expected = {
        "commit": commit,
        "processor": recorded.processor(),
        "model_id": model.model_id,
        "path": path,
        "next_seq_id": seq_id,
        "last_answer": seen[-1],
        "after": after,
        "loaded": loaded,
    }
    return recorded.write(release, folder, expected)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release")
    parser.add_argument("commit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(record(args.release, args.commit, Path(folder)))


if __name__ == "__main__":
    main()
