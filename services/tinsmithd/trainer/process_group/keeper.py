"""Starts the ranks of a pod again when they end, as the Training server's launcher does it.

The kubelet would do it too, after a pause that grows to five minutes, and each time with all
imports. Where there is no accelerator, a template that has imported what ranks need forks them.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

from tinsmithd.processes import EXIT_HOPELESS, describe_exit, environment, restarts, template

MODULE = "tinsmithd.trainer"
PRELOAD = "tinsmithd.trainer.preload"

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
    source, pauses = template.shared() or template.Template(PRELOAD), restarts.Pauses()
    try:
        while True:
            started_s = loop.time()
            status = await _once(source, asked)
            if not asked.done() and status != EXIT_HOPELESS:
                pause_s = pauses.after(loop.time() - started_s)
                _log.error("the ranks ended (%s); restart in %g s", describe_exit(status), pause_s)
                await asyncio.wait([asked], timeout=pause_s)
            if asked.done():
                return asked.result()
            if status == EXIT_HOPELESS:
                return status
    finally:
        source.close()


async def _once(source: template.Template, asked: "asyncio.Future[int]") -> int:
    """Run the ranks until they end, or until somebody asks for it."""
    # Flags win over what the environment and this process's own flags say.
    arguments = [*sys.argv[1:], "--restart=false", f"--live-with-pid={os.getpid()}"]
    program = await source.start(template.Launch(MODULE, arguments, environment()))
    ending = asyncio.create_task(program.wait())
    await asyncio.wait([ending, asked], return_when=asyncio.FIRST_COMPLETED)
    await restarts.stop(program)
    return await ending


def _answer(asked: "asyncio.Future[int]", status: int) -> None:
    if not asked.done():
        asked.set_result(status)
