"""How many checkpoints each owner and each model has, and of how many bytes: kept with each row,
never counted.

The row of `ANY_OWNER` has the sums, and that of a model a name that no owner has. What a damaged
row holds is not known: once it goes, what is left of its owner is counted anew.
"""

import json
import sqlite3
from collections.abc import Sequence

from tinsmithd.owners import ANY_OWNER, owner_of

OWNER = (
    "CASE instr(model_id, '/') WHEN 0 THEN 'default'"
    " ELSE substr(model_id, 1, instr(model_id, '/') - 1) END"
)
"""Whose a row is, as `owners.owner_of` says it; the text of an index, so it is always the same."""
IS_MODEL = "(owner >= '/' AND owner < '0')"
_OWNER_OF_MODEL = OWNER.replace("model_id", "substr(owner, 2)")
FILES = "json_each(CASE WHEN json_valid(record) THEN record ELSE '{}' END, '$.files') AS file"
"""The files of a row, as far as what is known of them is whole."""
NBYTES = "total(json_extract(file.value, '$[1]'))"
_COUNT = """
INSERT INTO tallies VALUES (?,?,?,?), (?,?,?,?), (?,?,?,?) ON CONFLICT DO UPDATE SET
checkpoints=checkpoints+excluded.checkpoints, nbytes=nbytes+excluded.nbytes
"""
SCHEMA = """
CREATE TABLE tallies (
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    checkpoints INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    PRIMARY KEY (owner, kind)
) WITHOUT ROWID;
"""


def change(db: sqlite3.Connection, row: Sequence[object], sign: int) -> Sequence[str] | None:
    """Count a row, or with `sign` -1 no more.

    Args:
        db: The catalogue's file, in a transaction.
        row: Its columns `model_id`, `kind` and `record`.

    Returns:
        The places of its files; None where it is damaged.
    """
    model_id, kind, record = (str(value) for value in row)
    places: Sequence[str] | None = None
    nbytes = 0
    try:
        files = json.loads(record)["files"]
        nbytes, places = sum(file[1] for file in files), [file[-1] for file in files]
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    keys = (owner_of(model_id), ANY_OWNER, key_of(model_id))
    db.execute(_COUNT, [value for key in keys for value in (key, kind, sign, sign * nbytes)])
    if sign < 0:
        db.execute("DELETE FROM tallies WHERE owner IN (?,?,?) AND checkpoints=0", keys)
    return places


def key_of(model_id: str) -> str:
    """What stands in place of an owner in the tally of a model."""
    return f"/{model_id}"


def count_anew(db: sqlite3.Connection, owner: str = "") -> None:
    """Count rows: of an owner of whom what is known was damaged; without one, of all."""
    of_rows, of_tallies, values = "", IS_MODEL, [owner][: bool(owner)]
    if owner:
        of_rows, of_tallies = f"WHERE {OWNER}=?", f"{IS_MODEL} AND {_OWNER_OF_MODEL}=?"
        db.execute(f"DELETE FROM tallies WHERE owner=? OR ({of_tallies})", (owner, owner))
    else:
        db.execute("DELETE FROM tallies")
    db.execute(
        "INSERT INTO tallies SELECT '/' || model_id, kind, count(*),"
        f" total((SELECT {NBYTES} FROM {FILES})) FROM checkpoints {of_rows}"
        " GROUP BY model_id, kind",
        values,
    )
    db.execute(
        f"INSERT INTO tallies SELECT {_OWNER_OF_MODEL} AS whose, kind, sum(checkpoints),"
        f" sum(nbytes) FROM tallies WHERE {of_tallies} GROUP BY whose, kind",
        values,
    )
    db.execute("DELETE FROM tallies WHERE owner=?", (ANY_OWNER,))
    db.execute(
        "INSERT INTO tallies SELECT ?, kind, sum(checkpoints), sum(nbytes) FROM tallies"
        f" WHERE NOT {IS_MODEL} GROUP BY kind",
        (ANY_OWNER,),
    )


def sums(db: sqlite3.Connection, owner: str, kind: str | None) -> tuple[int, int]:
    """Number of an owner's checkpoints of a kind, or of all, and their bytes."""
    where, values = "owner=?", [owner]
    if kind is not None:
        where, values = f"{where} AND kind=?", [owner, kind]
    query = f"SELECT total(checkpoints), total(nbytes) FROM tallies WHERE {where}"
    checkpoints, nbytes = db.execute(query, values).fetchone()
    return int(checkpoints), int(nbytes)
