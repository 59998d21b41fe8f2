"""A program of `test_template`: says what it was started with, or does what its argument says."""

import asyncio
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from tinsmithd import failpoints
from tinsmithd.processes.template import Launch, Template


def found() -> dict[str, object]:
    """What a program can see of its start; the same whether it was forked or not."""
    command = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
    return {
        "name": __name__,
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "command line": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(dict.fromkeys(sys.path)),
        "leads its session": os.getsid(0) == os.getpid(),
        "stdin": sys.stdin.read(),
        "descriptors": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1],
        "threads": (torch.get_num_threads(), threading.active_count()),
        "failpoints": str(failpoints._armed),
        "mask": os.umask(0o077),
        "limits": Path("/proc/self/limits").read_text(),
        "sitecustomized": os.environ.get("SITE_SAYS"),
    }


async def hold() -> None:
    """Start programs over a template of its own, say who they are, and wait to be killed."""
    template = Template("json")
    launch = Launch("template_probe", ["sleep"], os.environ)
    programs = [await template.fork(launch) for _ in range(2)]
    print(os.getpid(), *(program.pid for program in programs), flush=True)
    await programs[0].wait()


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "say":
        print(json.dumps(found()))
    elif what == "chance":
        print(random.random(), np.random.random())
    elif what == "exit":
        sys.exit(int(rest[0]))
    elif what == "die":
        os.kill(os.getpid(), int(rest[0]))
    elif what == "sleep":
        time.sleep(600)
    elif what == "hold":
        asyncio.run(hold())


if __name__ == "__main__":
    main()
