"""The file of keys: made, read, revoked; what it has is no key, and what is wrong is said."""

import json
import logging
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Clock
from tinsmithd.keys import KeyFile, KeyFileError, KeyRing, Scope
from tinsmithd.owners import ANY_OWNER, DEFAULT_OWNER, inner_id, owner_of, public_id


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    """A file that is not there yet."""
    return KeyFile(tmp_path / "keys.json")


def _ring(keys: KeyFile) -> tuple[KeyRing, Clock, Clock]:
    wall, monotonic = Clock(), Clock()
    return KeyRing(keys.path, wall, monotonic), wall, monotonic


def test_a_key_stands_for_its_tenant_and_is_not_in_the_file(keys: KeyFile) -> None:
    made = keys.create("alice", note="laptop")
    other = keys.create("bob", Scope.READ_ONLY)
    ring, _, _ = _ring(keys)
    caller = ring.caller(made.text)
    assert caller is not None
    assert (caller.owner, caller.scope, caller.key_id) == (
        "alice",
        Scope.TENANT,
        made.record.key_id,
    )
    assert made.text.startswith("tml-")
    assert len(made.text) == len("tml-") + 43  # 32 bytes, base64url
    text = keys.path.read_text()
    for key in (made.text, other.text):
        assert key not in text
        assert key.removeprefix("tml-") not in text
        assert key not in repr(made)
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert [each.tenant for each in keys.list()] == ["alice", "bob"]
    assert all(not each.digest for each in keys.list())


def test_texts_that_are_no_keys_stand_for_nobody(keys: KeyFile) -> None:
    made = keys.create("alice").text
    ring, _, _ = _ring(keys)
    wrong = [made[:-1], made + "A", made.swapcase(), "tml-", "", "tml-" + "A" * 43]
    wrong += [made.removeprefix("tml-"), " " + made, "tml-" + "A" * 10_000, "tml-\udce4"]
    assert [ring.caller(text) for text in wrong] == [None] * len(wrong)


def test_a_revoked_key_is_refused_once_the_file_was_looked_at(keys: KeyFile) -> None:
    made, kept = keys.create("alice"), keys.create("alice")
    ring, _, monotonic = _ring(keys)
    assert ring.caller(made.text) is not None
    assert keys.revoke(made.record.key_id).tenant == "alice"
    monotonic.now_s += 0.3
    assert ring.caller(made.text) is None
    assert not ring.holds(made.record.key_id)
    assert ring.caller(kept.text) is not None
    with pytest.raises(KeyFileError, match="has no key"):
        keys.revoke(made.record.key_id)


def test_a_key_expires(keys: KeyFile) -> None:
    made = keys.create("alice", expires_in_s=60)
    ring, wall, _ = _ring(keys)
    assert made.record.expires_s is not None
    wall.now_s = made.record.expires_s - 1
    assert ring.caller(made.text) is not None
    wall.now_s = made.record.expires_s
    assert ring.caller(made.text) is None
    assert not ring.holds(made.record.key_id)


def test_a_file_that_cannot_be_read_any_more_changes_nothing_and_is_said(
    keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    made = keys.create("alice").text
    ring, _, monotonic = _ring(keys)
    whole = keys.path.read_text()
    keys.path.write_text(whole[:-10])
    with caplog.at_level(logging.ERROR):
        for _ in range(10):
            monotonic.now_s += 1
            assert ring.caller(made) is not None
    assert len(caplog.records) == 1
    assert whole[20:80] not in caplog.text
    keys.path.unlink()
    monotonic.now_s += 1
    assert ring.caller(made) is not None
    keys.path.write_text(whole)
    keys.revoke(keys.list()[0].key_id)
    monotonic.now_s += 1
    assert ring.caller(made) is None


def test_scopes_say_what_a_caller_sees(keys: KeyFile) -> None:
    texts = {scope: keys.create("alice", scope).text for scope in Scope}
    ring, _, _ = _ring(keys)
    seen = {scope: ring.caller(text) for scope, text in texts.items()}
    assert all(seen.values())
    sees = {scope for scope, caller in seen.items() if caller and caller.sees_all}
    assert sees == {Scope.ADMIN, Scope.SERVER}
    server = seen[Scope.SERVER]
    assert server is not None
    assert server.owner == ANY_OWNER


def test_limits_are_of_tenants(keys: KeyFile) -> None:
    made = keys.create("alice").text
    assert keys.set_limits("alice", {"tenant_models_max": 3}) == {"tenant_models_max": 3}
    ring, _, monotonic = _ring(keys)
    caller = ring.caller(made)
    assert caller is not None
    assert caller.limit("tenant_models_max", 100) == 3
    assert caller.limit("tenant_samples_max", 100) == 100
    assert keys.set_limits("alice", {"tenant_models_max": None}) == {}
    monotonic.now_s += 1
    again = ring.caller(made)
    assert again is not None
    assert again.limit("tenant_models_max", 100) == 100
    for wrong in ({"models": 1}, {"tenant_models_max": -1}, {"tenant_models_max": True}):
        with pytest.raises(KeyFileError):
            keys.set_limits("alice", wrong)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"tenant": "a/b"}, "tenant"),
        ({"tenant": "*"}, "tenant"),
        ({"tenant": "a" * 64}, "tenant"),
        ({"scope": "root"}, "scope"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": float("nan")}, "expires_in_s"),
        ({"note": "two\nlines"}, "note"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    keys: KeyFile, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(KeyFileError, match=f"^{field}: "):
        keys.create(**arguments)
    assert not keys.path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=2),
        lambda d: d.update(secret="00"),
        lambda d: d["keys"][0].update(scope="root"),
        lambda d: d["keys"][0].update(tenant="*"),
        lambda d: d["keys"][0].update(digest="0"),
        lambda d: d["keys"][0].update(expires_s="soon"),
        lambda d: d["keys"].append(d["keys"][0]),
        lambda d: d["keys"][0].update(more=1),
        lambda d: d.update(limits={"alice": {"models": 1}}),
        lambda d: d.pop("keys"),
    ],
)
def test_a_file_of_another_form_is_refused_without_its_words(keys: KeyFile, change: Any) -> None:
    keys.create("alice")
    document = json.loads(keys.path.read_text())
    secret, digest = document["secret"], document["keys"][0]["digest"]
    change(document)
    keys.path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError) as refused:
        KeyRing(keys.path)
    assert secret not in str(refused.value)
    assert digest not in str(refused.value)


def test_writers_wait_for_each_other(keys: KeyFile) -> None:
    keys.create("first")

    def create(number: int) -> None:
        for _ in range(5):
            keys.create(f"tenant-{number}")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys.list()) == 21


def test_inner_ids_say_whose_they_are() -> None:
    assert inner_id(DEFAULT_OWNER, "m:1") == "m:1"  # as in journals of before there were owners
    assert inner_id("alice", "m:1") == "alice/m:1"
    for owner in (DEFAULT_OWNER, "alice"):
        inner = inner_id(owner, "m:1")
        assert (owner_of(inner), public_id(inner)) == (owner, "m:1")
