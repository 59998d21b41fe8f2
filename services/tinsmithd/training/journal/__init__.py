"""What survives: the durable order of calls and answers, and the snapshots that it counts."""

from tinsmithd.training.journal.journal import Journal, NoJournal
from tinsmithd.training.journal.records import (
    AddAnswer,
    AddCall,
    AddModel,
    AddSnapshot,
    CountAttempt,
    CountStart,
    DeletedModel,
    DeleteModel,
    DropAnswers,
    Fenced,
    ForgetCalls,
    LoseModel,
    StoreDamaged,
    StoredCall,
    StoredModel,
    StoredSnapshot,
    Trim,
    Write,
)
from tinsmithd.training.journal.sqlite_store import SqliteStore

__all__ = [
    "AddAnswer",
    "AddCall",
    "AddModel",
    "AddSnapshot",
    "CountAttempt",
    "CountStart",
    "DeleteModel",
    "DeletedModel",
    "DropAnswers",
    "Fenced",
    "ForgetCalls",
    "Journal",
    "LoseModel",
    "NoJournal",
    "SqliteStore",
    "StoreDamaged",
    "StoredCall",
    "StoredModel",
    "StoredSnapshot",
    "Trim",
    "Write",
]
