"""The process of a test in `test_recovery_engine`: two steps, of which a failpoint kills one."""

import sys

from data import collect, make_data
from engines import make_engine
from tinsmithd.domain import AdamParams, LoraConfig


def main() -> None:
    engine = make_engine(
        "reference", sys.argv[1], dtype="float32", zero_stage=0, on_progress=lambda _: None
    )
    engine.create_model("m", LoraConfig(rank=2))
    collect(engine, "m", make_data(0, 2), backward=True)
    engine.optim_step("m", AdamParams())
    print("one", flush=True)
    engine.optim_step("m", AdamParams())


if __name__ == "__main__":
    main()
