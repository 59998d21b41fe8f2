"""Starts the ranks of a pod again when they end, as the Training server's launcher does it.

The kubelet would do it too, after a pause that grows to five minutes, and each time with all
imports. Where there is no accelerator, a template that has imported what ranks need forks them.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from tinsmithd.processes import EXIT_HOPELESS, describe_exit, environment, template

MODULE = "tinsmithd.trainer"
PRELOAD = "tinsmithd.trainer.preload"
DELAY_S_FIRST = 0.1
DELAY_S_MAX = 30.0
SETTLED_S = 3.0
"""Ranks that lived for so long start again without delay."""
STOP_S_MAX = 10.0

_log = logging.getLogger(__name__)


def run(set_up: Callable[[], None]) -> int:
    """Run `tinsmithd.trainer` with this process's settings, again and again.

    Args:
        set_up: Sets this process up.

    Returns:
        An exit status: 128 and the number of the signal that asked this process to end;
        `EXIT_HOPELESS` where another start would not help.
    """
    set_up()
    return asyncio.run(_run())


async def _run() -> int:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _answer, asked, 128 + number)
    source = template.Template(PRELOAD)
    delay_s = DELAY_S_FIRST
    try:
        while True:
            started_s = loop.time()
            status = await _once(source, asked)
            if asked.done():
                return asked.result()
            if status == EXIT_HOPELESS:
                return status
            if loop.time() - started_s > delay_s + SETTLED_S:
                delay_s = DELAY_S_FIRST
            _log.error("the ranks ended (%s); restart in %g s", describe_exit(status), delay_s)
            await asyncio.wait([asked], timeout=delay_s)
            if asked.done():
                return asked.result()
            delay_s = min(2 * delay_s, DELAY_S_MAX)
    finally:
        source.close()


async def _once(source: template.Template, asked: "asyncio.Future[int]") -> int:
    """Run the ranks until they end, or until somebody asks for it."""
    # Flags win over what the environment and this process's own flags say.
    arguments = [*sys.argv[1:], "--restart=false", f"--live-with-pid={os.getpid()}"]
    process = await source.start(template.Launch(MODULE, arguments, environment()))
    ending = asyncio.create_task(process.wait())
    await asyncio.wait([ending, asked], return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        process.send_signal(signal.SIGTERM)
        await asyncio.wait([ending], timeout=STOP_S_MAX)
    if not ending.done():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return await ending


def _answer(asked: "asyncio.Future[int]", status: int) -> None:
    if not asked.done():
        asked.set_result(status)
