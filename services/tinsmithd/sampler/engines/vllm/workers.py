"""What runs in vLLM's own processes, which import this module when they start."""

import contextlib
import os
import select
import signal
import threading
from typing import Any

from tinsmithd.sampler.engines.vllm.scoring import mend
from tinsmithd.sampler.engines.vllm.settings import OWNER_VARIABLE


class WorkerExtension:
    """What vLLM mixes into its worker."""

    model_runner: Any

    def tinsmith_mend_scoring(self) -> None:
        """To be called before anything is scored: see `scoring`."""
        mend(self.model_runner)


def _end_with_owner(owner: int) -> None:
    """End with the Sampler, however it ends, and take vLLM's core along, which would stay."""
    parent = os.getppid()
    with contextlib.suppress(OSError):  # it is gone already
        select.select([os.pidfd_open(owner)], [], [])
    if parent not in (owner, 1):
        os.kill(parent, signal.SIGKILL)
    os._exit(1)


_owner = int(os.environ.get(OWNER_VARIABLE, "0"))
if _owner not in (0, os.getpid()) and hasattr(os, "pidfd_open"):
    threading.Thread(target=_end_with_owner, args=(_owner,), daemon=True).start()
