"""Gives a failpoint to one process and to none after it. Python imports this at its start, where
this folder is on its path.

A test writes `TINSMITH_TEST_ONCE/<kind>` (kind: the name of the process, such as "training" or
"trainer"), for example `wal_fsync:kill@3`. The first process of that kind which starts then takes
the file away, so that the one that is started in its place has no failpoint. It leaves its process
id in `<kind>.claimed`.
"""

import os
import sys


def _claim(folder: str) -> None:
    arguments = " ".join(sys.orig_argv)
    if "torch.distributed.run" in arguments or "-m tinsmithd." not in arguments:
        return
    kind = arguments.split("-m tinsmithd.")[1].split()[0]
    # The process that starts the ranks of a group computes nothing.
    if os.environ.get("TINSMITH_TRAINER_RANKS", "1") != "1" and "RANK" not in os.environ:
        return
    file, mine = os.path.join(folder, kind), os.path.join(folder, f"{kind}.{os.getpid()}")
    try:
        os.rename(file, mine)  # one process of many can do this
    except FileNotFoundError:
        return
    with open(mine) as opened:
        os.environ["TINSMITH_FAILPOINTS"] = opened.read().strip()
    with open(mine, "w") as opened:
        opened.write(str(os.getpid()))
    os.rename(mine, file + ".claimed")


if "TINSMITH_TEST_ONCE" in os.environ:
    _claim(os.environ["TINSMITH_TEST_ONCE"])
