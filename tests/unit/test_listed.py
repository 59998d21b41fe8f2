"""What a list has of the catalogue's rows: each is checked, and none is made while others wait."""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Row

import pytest

from checkpoints import LORA
from tinsmithd.checkpoint import messages
from tinsmithd.checkpoint.catalogue import Catalogue, Checkpoint, digest_of, open_local, read
from tinsmithd.checkpoint.store import Blob
from tinsmithd.domain import CheckpointKind, CheckpointPath
from tinsmithd.errors import DataLoss


def checkpoint(name: str, **metadata: str) -> Checkpoint:
    path = CheckpointPath("m1", CheckpointKind.SAMPLER, name)
    blob = Blob("model_state.json", 2, "ab" * 32)
    return Checkpoint(path, "tiny", LORA, 3, 1.5, 1e12, metadata, [blob])


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    transactions = open_local(tmp_path / "catalogue.sqlite", may_be_new=True)
    opened = Catalogue(transactions, time.time)
    for number in range(6):
        opened.add(checkpoint(f"c{number}", who='ä"\\ \U0001f600\x7f'), overwrite=False)
    messages._remembered.cache_clear()
    yield opened
    opened.close()


def names(catalogue: Catalogue, size: int = 10) -> list[str]:
    """Those of a page."""
    found, total = catalogue.page_of(
        messages.listed, owner="*", model_id="", kind=None, before=None, size=size
    )
    return [each.name for each in messages.page_to_pb(found, size, total).checkpoints]


def damage(catalogue: Catalogue, number: int, sql: str) -> None:
    """Change a row, past its digest."""
    catalogue._db.execute(f"UPDATE checkpoints SET {sql} WHERE number=?", (number,))


def test_a_list_has_what_is_known_of_a_checkpoint(catalogue: Catalogue) -> None:
    """The same from memory as when it was made."""
    for _ in range(2):
        found, total = catalogue.page_of(
            messages.listed, owner="*", model_id="", kind=None, before=None, size=10
        )
        page, _ = catalogue.page(model_id="", kind=None, before=None, size=10)
        written = messages.page_to_pb(found, 10, total)
        assert list(written.checkpoints) == [
            messages.checkpoint_to_pb(each, with_files=False) for each in page
        ]
    assert messages._remembered.cache_info().hits == 6


@pytest.mark.parametrize(
    "sql",
    [
        "record=replace(record, 'tiny', 'tidy')",
        "expire_time_s=expire_time_s+1",
        "digest=replace(digest, substr(digest, 1, 1), 'x')",
        "record=CAST('{}' AS BLOB)",
        "name='other'",
    ],
)
def test_a_row_that_was_listed_is_checked_again_once_it_is_another(
    catalogue: Catalogue, sql: str
) -> None:
    assert names(catalogue) == ["c5", "c4", "c3", "c2", "c1", "c0"]
    damage(catalogue, 4, sql)
    assert names(catalogue) == ["c5", "c4", "c2", "c1", "c0"]


def test_a_page_is_filled_behind_what_is_damaged(catalogue: Catalogue) -> None:
    for number in (6, 5, 3):
        damage(catalogue, number, "digest='x'")
    assert names(catalogue, 2) == ["c3", "c1"]
    assert names(catalogue, 9) == ["c3", "c1", "c0"]


def test_others_use_the_catalogue_while_a_page_is_made(catalogue: Catalogue) -> None:
    def made(row: Row) -> str:
        adding = threading.Thread(target=lambda: catalogue.get(read(row).path))
        adding.start()
        adding.join(30)
        assert not adding.is_alive()
        return str(row["name"])

    found, _ = catalogue.page_of(made, owner="*", model_id="", kind=None, before=None, size=2)
    assert found == ["c5", "c4"]


def test_what_is_long_is_not_remembered(catalogue: Catalogue) -> None:
    catalogue.add(checkpoint("long", who="x" * messages.LISTED_CHARACTERS_MAX), overwrite=False)
    assert names(catalogue, 1) == ["long"]
    assert messages._remembered.cache_info().currsize == 0


@pytest.mark.parametrize(
    "value",
    [
        *(7, -1, 2**62, None, 1.5, 1e300, float("inf"), True, CheckpointKind.SAMPLER),
        *("plain", 'ä"\\/\n\x00\x7f\U0001f600\udc80', [1, ["a", None]]),
    ],
)
def test_the_digest_of_columns_is_that_of_their_json(value: object) -> None:
    """What earlier releases wrote stays what it is."""
    expected = hashlib.sha256(json.dumps([value, "x"]).encode()).hexdigest()
    assert digest_of(value, "x") == expected


def test_no_digest_is_of_what_no_column_has() -> None:
    """A blob in place of a text is damage, whatever its bytes."""
    with pytest.raises(TypeError):
        digest_of(b"plain")
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.row_factory = sqlite3.Row
        row = db.execute("SELECT 1, 'm', 'sampler', 'n', NULL, CAST('{}' AS BLOB), 'x'").fetchone()
        with pytest.raises(DataLoss):
            read(row)
