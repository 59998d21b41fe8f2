"""Row G3: calls through a Training server whose rank has the settings of deploy/, on one GPU.

Its pair is the engine alone with the same settings, in this process; both are on the GPU at once.
"""

import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml

import tinsmith
from bench.configs import Shape, write_model
from bench.harness import Result, Side, estimate, measure, middle, ratio, walls
from bench.sides import LORA, Ours, Settings
from faults.processes import Training
from tinsmith import types
from tinsmithd.domain import Datum

DEPLOY = Path(__file__).parents[2] / "deploy"
PREFIX = "TINSMITH_TRAINER_"
ITS_OWN = ("link_secret_file", "base_model")
"""Settings of a pod that are other ones here."""
RATIO_TARGET = 1.10
WAIT_S_MAX = 900.0


def deployed() -> tuple[dict[str, object], dict[str, str]]:
    """Settings of a rank as deploy/overlays/gpu has them, and its other variables."""
    base = tomllib.loads((DEPLOY / "base" / "config.toml").read_text())["trainer"]
    settings: dict[str, object] = {k: v for k, v in base.items() if k not in ITS_OWN}
    text = (DEPLOY / "overlays" / "gpu" / "trainer.yaml").read_text()
    (workload,) = (found for found in yaml.safe_load_all(text) if found["kind"] == "StatefulSet")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: str(each["value"]) for each in container["env"]}
    lines = (DEPLOY / "overlays" / "gpu" / "parameters.env").read_text().splitlines()
    variables |= dict(line.split("=", 1) for line in lines if "=" in line)
    environment = {}
    for name, value in variables.items():
        if name.startswith(PREFIX):
            settings[name.removeprefix(PREFIX).lower()] = value
        elif not name.startswith("TINSMITH_"):
            environment[name] = value
    return settings, environment


@contextmanager
def training_client(folder: Path) -> Iterator[tinsmith.TrainingClient]:
    """A model on a Training server with such a rank."""
    settings, environment = deployed()
    with (
        tempfile.TemporaryDirectory() as data,
        Training(folder, Path(data)) as training,
    ):
        training.start_rank(env=environment, **settings)
        service = tinsmith.ServiceClient(base_url=training.address)
        create = service.create_lora_training_client
        yield create(folder.name, rank=LORA.rank, seed=1, train_unembed=False).result(WAIT_S_MAX)


def through_server(
    shape: Shape,
    settings: Settings,
    batches: Sequence[Sequence[Datum]],
    peak: float | None,
    until_done: Callable[[Callable[[], object]], Callable[[], None]],
) -> list[Result]:
    """Row G3.

    Args:
        shape: The model.
        settings: Of the run.
        batches: The data; all go in one call.
        peak: Operations a second of this GPU at most; None where that is not known.
        until_done: Lets a function wait for the GPU of this process.
    """
    folder = write_model(shape, settings.models, dtype=torch.bfloat16)
    said, _ = deployed()
    given: Mapping[str, int] = {
        key: int(str(said[key])) for key in ("micro_batch_tokens_max", "zero_stage") if key in said
    }
    ours = Ours(folder, replace(settings, **given), dtype=str(said["dtype"]))  # type: ignore[arg-type]
    together = [datum for batch in batches for datum in batch]
    data = [
        types.Datum(types.ModelInput.from_ints(datum.tokens.tolist()), dict(datum.loss_fn_inputs))
        for datum in together
    ]
    with training_client(folder) as client:

        def call() -> None:
            client.forward_backward(data, "cross_entropy").result(WAIT_S_MAX)

        def clear() -> None:
            client.optim_step(types.AdamParams(learning_rate=0.0)).result(WAIT_S_MAX)

        timings = measure(
            [
                Side("server", call, clear),
                Side("engine", until_done(lambda: ours.forward_backward(together)), ours.clear),
            ],
            settings.pairs,
            warm_ups=3,
        )
    tokens = sum(len(datum.tokens) for datum in together)
    sides = {name: middle(found) for name, found in timings.items()}
    work = f"{len(together)} data in a call, {tokens:,} tokens, {shape.name}, settings of deploy"
    results = [
        Result(
            "G3",
            f"{work}: through the Training server / the engine alone",
            ratio(timings["server"], timings["engine"]),
            target=RATIO_TARGET,
            sides=sides,
            notes="; ".join(f"{k} {tokens / t.wall_s:,.0f} tokens/s" for k, t in sides.items()),
        )
    ]
    if peak is not None:
        flops = 4 * shape.matmul_parameters * tokens
        mfu = estimate(flops / peak / walls(timings["server"]))
        what = f"MFU (4N) through the Training server, {work}"
        results.append(Result("G3", what, mfu, "of peak", higher_is_better=True))
    return results
