"""What a process does around its own work, and how one starts and watches another."""

from tinsmithd.processes.allocator import give_back_freed_memory, keep_freed_memory
from tinsmithd.processes.child import Child, Ended, Log, describe_exit, environment
from tinsmithd.processes.collector import collect_between_calls
from tinsmithd.processes.logs import StderrWriter, log_to_stderr
from tinsmithd.processes.process import (
    EXIT_HOPELESS,
    die_with_parent,
    give_up,
    load_or_exit,
    serve,
    set_up,
)

__all__ = [
    "EXIT_HOPELESS",
    "Child",
    "Ended",
    "Log",
    "StderrWriter",
    "collect_between_calls",
    "describe_exit",
    "die_with_parent",
    "environment",
    "give_back_freed_memory",
    "give_up",
    "keep_freed_memory",
    "load_or_exit",
    "log_to_stderr",
    "serve",
    "set_up",
]
