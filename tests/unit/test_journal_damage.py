"""What a damaged journal gives: what was written, or word of the damage."""

import random
from pathlib import Path

import pytest

from journals import SqliteDisk, answer, begun, call, record, stored, work
from tinsmithd.training.journal import StoreDamaged

FLIPS = 50


@pytest.fixture
def sqlite_disk(tmp_path: Path) -> SqliteDisk:
    return SqliteDisk(tmp_path / "journal")


async def filled(disk: SqliteDisk) -> None:
    """Calls of both models, with answers, in a closed file."""
    pairs = [(position, model_id) for position in range(1, 9) for model_id in "ab"]
    store = await begun(disk, *(add(*pair) for pair in pairs for add in (call, record)))
    await store.close()


async def read_all(disk: SqliteDisk, *, calls: bool = False) -> int:
    """Read all that `filled` wrote; it is that or known to be damaged. Returns how much was."""
    store = disk.store()
    damaged = 0
    try:
        found = (await store.claim()).models
        if calls:
            whole = [[*map(stored, range(1, 9))]] * 2
            damaged += sum(bool(each.lost) for each in found)
            assert damaged or [list(each.calls) for each in found] == whole
        for position, model_id in ((n, name) for n in range(1, 9) for name in "ab"):
            for read, expected in ((store.work, work), (store.answer, answer)):
                try:
                    assert await read(model_id, position) == expected(position)
                except StoreDamaged:
                    damaged += 1
    except StoreDamaged:
        damaged += 1  # it is not even taken over
    finally:
        await store.close()
    return damaged


@pytest.mark.parametrize("table", ["payloads", "answers"])
@pytest.mark.parametrize(
    "change",
    [
        "data=CAST(replace(data, x'01', x'03') || x'00' AS BLOB)",
        "data=substr(data, 1, length(data) - 1)",
        "data=x''",
        "data=zeroblob(length(data))",
        "crc32=crc32 + 1",
        "crc32='none'",
        "position=position + 100",
    ],
)
async def test_changed_content_is_damage(sqlite_disk: SqliteDisk, table: str, change: str) -> None:
    """A payload or an answer that is not what was written is never handed out."""
    await filled(sqlite_disk)
    sqlite_disk.tamper(f"UPDATE {table} SET {change} WHERE model_id='a' AND position=2")
    assert await read_all(sqlite_disk) == 1


async def test_flipped_bits_of_the_file_never_give_other_content(sqlite_disk: SqliteDisk) -> None:
    """Wherever a bit flips, payloads and answers are what was written, or damaged."""
    await filled(sqlite_disk)
    data = (sqlite_disk.folder / "journal.sqlite").read_bytes()
    rng, noticed = random.Random(0), 0
    for number in range(FLIPS):
        rotten = SqliteDisk(sqlite_disk.folder.with_name(f"rotten-{number}"))
        rotten.folder.mkdir()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (rotten.folder / "journal.sqlite").write_bytes(changed)
        noticed += await read_all(rotten) > 0
    assert noticed > FLIPS // 3  # the pages of empty tables have nothing to damage


@pytest.mark.parametrize(
    ("statement", "damaged"),
    [
        ("UPDATE payloads SET data=CAST('text' AS TEXT) WHERE position=2", 2),
        ("UPDATE OR REPLACE payloads SET position=2 WHERE position=3", 4),
        ("UPDATE models SET about='{'", 1),
        ("UPDATE models SET about=x'ff'", 1),
        ("UPDATE meta SET value='x' WHERE name='epoch'", 1),
        ("UPDATE calls SET seq_id=13 WHERE position=2", 2),
    ],
    ids=["type", "place", "about", "about is no text", "epoch", "call"],
)
async def test_damage_to_types_places_and_rows_is_found(
    sqlite_disk: SqliteDisk, statement: str, damaged: int
) -> None:
    """Other types, places and rows than were written are damage, as a claim's refusal or later."""
    await filled(sqlite_disk)
    sqlite_disk.tamper(statement)
    assert await read_all(sqlite_disk, calls=True) == damaged
