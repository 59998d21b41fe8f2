"""One rank of row "loading": loads a model in ZeRO stage 3 and prints what that took, as JSON.

Arguments: model folder, where `{rank}` stands for the rank; dtype of a frozen base; "lora" or
"full". Peaks are VmHWM of `/proc/self/status`: when the rank has what it keeps of the model, and
when the engine is there. `before_bytes` is VmRSS when loading begins.
"""

import json
import sys
import time

import torch

from bench.memory_worker import status_bytes
from engines import leave_together
from tinsmithd.config import TrainerConfig
from tinsmithd.domain import FullConfig, LoraConfig
from tinsmithd.trainer.engines.factory import engine_makers
from tinsmithd.trainer.engines.registry import Engines
from tinsmithd.trainer.process_group import distributed


def main() -> None:
    """Load, and measure."""
    folder, dtype, tuning = sys.argv[1:]
    torch.set_num_threads(1)
    rank, _ = distributed.rank_and_world_size()
    config = TrainerConfig(
        engine="deepspeed", base_model=folder.format(rank=rank), dtype=dtype, zero_stage=3
    )
    peak = 0

    def on_progress(message: str) -> None:
        nonlocal peak
        if ", loaded in " in message:
            peak = status_bytes("VmHWM")

    makers = engine_makers(config, on_progress)
    before, start_s = status_bytes("VmRSS"), time.monotonic()
    engines = Engines(makers, FullConfig if tuning == "full" else LoraConfig)
    found = {
        "wall_s": time.monotonic() - start_s,
        "before_bytes": before,
        "loaded_peak_bytes": peak,
        "peak_bytes": status_bytes("VmHWM"),
        "fingerprint": engines.identity["base_model"],
    }
    sys.stdout.write(json.dumps(found) + "\n")  # at once, so that lines of ranks do not mix
    sys.stdout.flush()
    leave_together(rank)


if __name__ == "__main__":
    main()
