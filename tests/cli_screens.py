"""The screens of `docs/cli.md`, made by the program on a real cluster; `make screens` writes them.

The names in them are made up, and the cluster's ports are those that a person would have.
"""

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

import commands
from clusters import RunningCluster
from tinsmith import AdamParams, Datum, ModelInput, ServiceClient
from tinsmith import v1 as pb
from tinsmith.cluster import connect

MODEL = "pig-latin"
TEXT = "The tin smith mends the kettle."
PORTS = {"training": "50051", "sampler": "50052", "checkpoint": "50053"}


def prepare(cluster: RunningCluster) -> None:
    """Train a little, so that there is something to see."""
    with connect(cluster.address) as stubs:
        lora = pb.LoraConfig(rank=8, seed=1)
        request = pb.CreateModelRequest(
            model_id=MODEL, lora_config=lora, user_metadata={"project": "kettles"}
        )
        stubs.training.CreateModel(request)
    with ServiceClient(base_url=cluster.address) as service:
        trainer = service.get_training_client(MODEL).result()
        tokens = trainer.get_tokenizer().encode(TEXT)
        inputs = {"target_tokens": np.array(tokens[1:])}
        for _ in range(3):
            trainer.forward_backward(
                [Datum(ModelInput.from_ints(tokens[:-1]), inputs)], "cross_entropy"
            )
            trainer.optim_step(AdamParams(learning_rate=1e-3)).result()
        trainer.save_state("halfway").result()
        trainer.save_weights_for_sampler("final").result()


def screen(line: str, cluster: RunningCluster | None) -> str:
    """What a terminal shows after a command line."""
    variables = {}
    if cluster is not None:
        variables = {"TINSMITH_ADDRESS": cluster.address, "TINSMITH_CACHE": "cache"}
    text = commands.shown(shlex.split(line)[1:], **variables)
    text = re.sub(r"tml-[\w-]{20,}", "tml-...", text)  # nobody shall take it for one in use
    if cluster is not None:
        for name, port in PORTS.items():
            host, _, real = cluster.addresses[name].rpartition(":")
            text = text.replace(f"{host}:{real}", f"{host}:{port}")
    return f"$ {line}\n{text}"


def drawn(document: str, cluster: RunningCluster | None) -> str:
    """The document with its screens made anew; without a cluster only those of `--help`."""

    def made(found: re.Match[str]) -> str:
        marker, between, before = found.groups()
        line = " ".join(marker.split())
        alone = line.endswith("--help")
        return marker + between + (screen(line, cluster) if cluster or alone else before)

    return commands.SCREEN.sub(made, document)


def main(base_model: Path) -> None:
    """Write the screens into the document."""
    document = commands.DOCUMENT.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with RunningCluster(base_model, Path("data")) as cluster:
            prepare(cluster)
            document = drawn(document, cluster)
    commands.DOCUMENT.write_text(document)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
