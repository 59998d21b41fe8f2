"""Starts Python programs by forking a process that has imported what they need."""

from tinsmithd.processes.template.client import (
    Forked,
    Launch,
    Program,
    Template,
    TemplateError,
    shared,
    start_anew,
)
from tinsmithd.processes.template.program import ForkedChild, fork, is_forked

__all__ = [
    "Forked",
    "ForkedChild",
    "Launch",
    "Program",
    "Template",
    "TemplateError",
    "fork",
    "is_forked",
    "shared",
    "start_anew",
]
