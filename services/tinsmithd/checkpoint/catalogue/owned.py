"""What the catalogue asks its file about owners; `model_id` there is as it is inside.

No query looks at more rows than it gives, but for those that have expired and were not removed yet.
"""

import contextlib
import heapq
import itertools
import sqlite3

from tinsmithd.checkpoint.catalogue import tallies
from tinsmithd.checkpoint.catalogue.tallies import FILES, NBYTES, OWNER
from tinsmithd.domain import CheckpointKind, CheckpointPath
from tinsmithd.owners import ANY_OWNER, public_id, said_id

_PUBLIC = "substr(model_id, instr(model_id, '/') + 1)"
_PUBLIC_OF_TALLY = _PUBLIC.replace("model_id", "substr(owner, 2)")
_EPHEMERAL = "instr(record, '\"ephemeral\": {') > 0"
INDEXES = f"""
CREATE INDEX checkpoints_by_owner ON checkpoints ({OWNER}, kind, number);
CREATE INDEX checkpoints_by_kind ON checkpoints (kind, number);
CREATE INDEX checkpoints_that_expire ON checkpoints (expire_time_s)
    WHERE expire_time_s IS NOT NULL;
CREATE INDEX checkpoints_of_owners_that_expire ON checkpoints ({OWNER}, kind, expire_time_s)
    WHERE expire_time_s IS NOT NULL;
CREATE INDEX checkpoints_ephemeral ON checkpoints (number) WHERE {_EPHEMERAL};
"""
BY_MODEL = f"""
CREATE INDEX checkpoints_by_model ON checkpoints (model_id, kind, number);
CREATE INDEX tallies_by_public_id ON tallies ({_PUBLIC_OF_TALLY}) WHERE {tallies.IS_MODEL};
"""
BY_PUBLIC_ID_3 = f"""
CREATE INDEX checkpoints_by_public_id ON checkpoints ({_PUBLIC}, kind, name);
"""
"""What format 3 had in its place."""
_MODELS = f"SELECT substr(owner, 2) FROM tallies WHERE {_PUBLIC_OF_TALLY}=? AND {tallies.IS_MODEL}"
EPHEMERAL = f"SELECT * FROM checkpoints WHERE {_EPHEMERAL} ORDER BY number"
EXPIRED = "SELECT number FROM checkpoints WHERE expire_time_s IS NOT NULL AND expire_time_s <= ?"
_LIVES = "(expire_time_s IS NULL OR expire_time_s > ?)"


def newest_first(
    db: sqlite3.Connection,
    owner: str,
    model_id: str,
    kind: CheckpointKind | None,
    below: int,
    now_s: float,
    size: int,
) -> list[sqlite3.Row]:
    """Rows of checkpoints that live, those of the highest numbers first.

    Args:
        db: The catalogue's file.
        owner: Only this one's; `ANY_OWNER` means all.
        model_id: Only this model's, as its owner says it; empty means all.
        kind: Only this kind; None means all.
        below: Only lower numbers.
        now_s: Only those that are not expired then.
        size: Maximum number of them.
    """
    kinds = list(CheckpointKind) if kind is None else [kind]
    source = "checkpoints"
    # An index has each kind in order, and not both together.
    if model_id:
        source += " INDEXED BY checkpoints_by_model"  # SQLite itself would walk through a kind
        where = "model_id=? AND kind=? AND number<?"
        each = [(where, [inner, one]) for inner in models(db, owner, model_id) for one in kinds]
    elif owner != ANY_OWNER:
        each = [(f"{OWNER}=? AND kind=? AND number<?", [owner, one]) for one in kinds]
    elif kind is not None:
        each = [("kind=? AND number<?", [kind])]
    else:
        each = [("number<?", [])]
    with contextlib.ExitStack() as stack:
        orders = [
            stack.enter_context(
                contextlib.closing(
                    db.execute(
                        f"SELECT * FROM {source} WHERE {one} AND {_LIVES} ORDER BY number DESC",
                        (*of, below, now_s),
                    )
                )
            )
            for one, of in each
        ]
        merged = heapq.merge(*orders, key=lambda row: -row["number"])
        return list(itertools.islice(merged, size))


def count(
    db: sqlite3.Connection,
    owner: str,
    model_id: str,
    kind: CheckpointKind | None,
    now_s: float,
) -> int:
    """Number of these that live, damaged ones among them."""
    inners = models(db, owner, model_id) if model_id else []
    keys = [tallies.key_of(inner) for inner in inners] if model_id else [owner]
    every = sum(tallies.sums(db, key, kind)[0] for key in keys)
    where, values = _expired(owner, kind, now_s)
    if model_id:
        where = f"{where} AND +model_id IN ({', '.join('?' for _ in inners)})"
    query = f"SELECT count(*) FROM checkpoints WHERE {where}"
    return every - int(db.execute(query, [*values, *inners]).fetchone()[0])


def models(db: sqlite3.Connection, owner: str, model_id: str) -> list[str]:
    """Models of this id as they are called inside; several where all owners are meant."""
    if owner != ANY_OWNER:
        return [said_id(owner, model_id)]
    return list(dict.fromkeys(row[0] for row in db.execute(_MODELS, (model_id,))))


def anybodys(db: sqlite3.Connection, path: CheckpointPath) -> str | None:
    """Whose model the checkpoint of a path is of: the path's own, or where that has none, that of
    the newest one; None where there is none."""
    inners = models(db, ANY_OWNER, public_id(path.model_id))
    query = (
        "SELECT model_id FROM checkpoints WHERE model_id IN"
        f" ({', '.join('?' for _ in inners)}) AND kind=? AND name=?"
        " ORDER BY model_id=? DESC, number DESC"
    )
    row = db.execute(query, [*inners, path.kind, path.name, path.model_id]).fetchone()
    return None if row is None else str(row["model_id"])


def stored_bytes(db: sqlite3.Connection, owner: str, now_s: float) -> int:
    """Bytes of an owner's checkpoints that live; files that several have count for each."""
    _, every = tallies.sums(db, owner, None)
    expired = 0
    for kind in CheckpointKind:
        where, values = _expired(owner, kind, now_s)
        query = f"SELECT {NBYTES} FROM checkpoints, {FILES} WHERE {where}"
        expired += int(db.execute(query, values).fetchone()[0])
    return every - expired


def _expired(owner: str, kind: CheckpointKind | None, now_s: float) -> tuple[str, list[object]]:
    """A condition on those that have expired and are still there: an index has them alone."""
    where, values = "expire_time_s IS NOT NULL AND expire_time_s <= ?", [now_s]
    if owner != ANY_OWNER:
        # Both kinds by name: the index has the kind before the time.
        kinds = [kind] if kind is not None else list(CheckpointKind)
        marks = ", ".join("?" for _ in kinds)
        return f"{OWNER}=? AND kind IN ({marks}) AND {where}", [owner, *kinds, *values]
    if kind is not None:
        return f"{where} AND +kind=?", [*values, kind]
    return where, list(values)
