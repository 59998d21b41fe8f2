"""`python -m tinsmithd.trainer`: a rank group of one, or of `--ranks` on each of some machines.

`torchrun -m tinsmithd.trainer` starts ranks, too.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from tinsmithd import tracing
from tinsmithd.config import ConfigError, TrainerConfig
from tinsmithd.domain import LoraConfig
from tinsmithd.errors import TinsmithError
from tinsmithd.processes import (
    EXIT_HOPELESS,
    die_with_parent,
    give_up,
    load_or_exit,
    log_to_stderr,
    set_up,
)
from tinsmithd.rpc import link_secret
from tinsmithd.tls import Certificates, of_cluster
from tinsmithd.tracing.asked import start_spans
from tinsmithd.trainer.process_group import keeper, nodes, starter
from tinsmithd.trainer.process_group.devices import devices
from tinsmithd.trainer.process_group.heartbeat import EXIT_GROUP_LOST, MeetError

EXIT_DEVICE_LOST = 1
LAST_SPANS_S_MAX = 0.5
"""Seconds that the last spans get to leave this process."""

_log = logging.getLogger(__name__)


Words = list[Callable[[], None]]
"""Calls to make before the process ends."""


def _serve(
    config: TrainerConfig,
    certificates: Certificates | None,
    last_words: Words,
    farewells: Words,
) -> None:
    # Wrong settings must be found before heavy imports take their seconds.
    import torch

    from tinsmithd.trainer import link, progress
    from tinsmithd.trainer.commands import Commands
    from tinsmithd.trainer.engines.factory import engine_makers, work_of
    from tinsmithd.trainer.engines.registry import Engines
    from tinsmithd.trainer.process_group import alike, distributed

    if config.threads:
        torch.set_num_threads(config.threads)
    rank, world_size = distributed.rank_and_world_size()
    server = link.LinkTarget(config.training_target, config.link_secret_file, certificates)
    loading = link.LoadingLink(server) if rank == 0 else None

    def on_progress(message: str) -> None:
        progress.made()
        if loading is not None:
            loading.say(message)

    if world_size > 1:
        on_progress(f"waiting for {world_size} ranks")
        distributed.init(config.collective_timeout_s)
        farewells.append(distributed.leave)
        alike.check(config, rank, distributed.broadcast_bytes)
    distributed.watch(config.progress_timeout_s)
    engines = Engines(engine_makers(config, on_progress), LoraConfig)
    commands = Commands(engines, world_size=world_size, rank=rank)
    if loading is None:
        link.follow(commands, distributed.broadcast_bytes)
        return
    loading.close()
    greeting = link.hello(
        *(engines, config.engine, world_size, config.launch_token.get_secret_value()),
        work=work_of(config.base_model),
    )

    def on_link(begun: link.Link) -> None:
        last_words[:] = [begun.leave]

    broadcast = distributed.broadcast_bytes
    link.lead(commands, server, greeting, broadcast, on_link, distributed.memories)


def _end(status: int, farewells: Sequence[Callable[[], None]]) -> NoReturn:
    for farewell in farewells:
        farewell()
    tracing.stop(LAST_SPANS_S_MAX)
    # At the interpreter's own end, threads of the process group could abort.
    os._exit(status)


def _end_on_signals(last_words: Words, farewells: Words) -> None:
    """Let SIGTERM and Ctrl-C end this process after a goodbye to the server and the other ranks.

    Python's own handlers run in the main thread, which may be waiting in a collective for ever.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach())
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)

    def wait() -> None:
        (signum,) = receiver.recv(1)
        _end(128 + signum, [*last_words, *farewells])

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _die_with_parent(config: TrainerConfig) -> None:
    """Let this process end with the one that started it, even while it is stopped.

    Only Linux can do this; elsewhere a rank finds out by its heartbeat.
    """
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    parent = os.getppid()
    if started_by_torchrun or config.live_with_pid == parent:
        die_with_parent(parent)


def _start_several(config: TrainerConfig) -> None:
    """Be the one who starts the ranks of this machine, unless the group is this process alone."""
    try:
        place = nodes.place(
            config.nodes, config.node, config.ranks or devices(), config.meet_address
        )
        if place.nodes * place.ranks == 1:
            return
        secret = ""
        if place.nodes > 1:
            # Of the time before they are there.
            log_to_stderr(config.log_level, config.section, config.log_format)
            secret = link_secret.read(config.link_secret_file, link_secret.RANKS_KEY)
    except ConfigError as error:
        give_up(config.section, error)
    sys.exit(starter.run(place, secret, lambda: set_up(config)))


def main() -> None:
    """Run one rank, or a whole group, until it is ended."""
    config = load_or_exit(TrainerConfig)
    _die_with_parent(config)
    rank = os.environ.get("RANK")
    if rank is None and config.restart:
        sys.exit(keeper.run(lambda: set_up(config)))
    if rank is None:
        _start_several(config)
    set_up(config)
    last_words: Words = []
    farewells: Words = []
    _end_on_signals(last_words, farewells)
    try:
        certificates = None
        if rank in (None, "0"):
            link_secret.read(config.link_secret_file, link_secret.RANKS_KEY)
            certificates = of_cluster(config)
            start_spans(config)
        _serve(config, certificates, last_words, farewells)
    except ConfigError as error:
        _log.error("%s", error)
        _end(EXIT_HOPELESS, farewells)
    except TinsmithError as error:
        _log.error("%s", str(error))  # of what whoever runs this process has set
        _end(EXIT_HOPELESS, farewells)
    except MeetError as error:
        _log.error("%s", error)
        _end(EXIT_GROUP_LOST, farewells)
    except Exception as error:
        if farewells:
            _end_among_others(error)
        _end_if_sticky(error)
        raise


def _end_if_sticky(error: Exception) -> None:
    """End a rank whose device is lost; the interpreter's own end might wait for that device."""
    from tinsmithd.modeling.device_errors import is_sticky

    if is_sticky(error):
        _log.error("the rank cannot use its device any more", exc_info=error)
        os._exit(EXIT_DEVICE_LOST)


def _end_among_others(error: Exception) -> NoReturn:
    """End a rank of several at once, since the state of the others is unknown."""
    from tinsmithd.trainer.process_group import distributed

    rank, _ = distributed.rank_and_world_size()
    left = distributed.rank_that_left()
    if left is None:
        _log.error("rank %d failed", rank, exc_info=error)
    else:
        _log.info("rank %d ends: rank %d was ended", rank, left)
    os._exit(EXIT_GROUP_LOST)


if __name__ == "__main__":
    main()
