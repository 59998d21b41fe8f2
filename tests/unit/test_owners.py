"""Ids inside have their owner in them: nobody can say one, and nothing shows one."""

from pathlib import Path

from tinsmithd.domain import CheckpointPath
from tinsmithd.keys import ANONYMOUS, Caller, Scope, acting_for
from tinsmithd.owners import ANY_OWNER, DEFAULT_OWNER, said_id
from tinsmithd.training.call import model_lost
from tinsmithd.training.models import DiskSnapshotStore

TEXT = "tinsmith://m:1/weights/one"


def test_what_a_caller_says_is_never_an_id_of_another_owner() -> None:
    for owner in (DEFAULT_OWNER, "alice"):
        inner = {said_id(owner, said) for said in ("bob/m", "alice/m", "/m", "a/b/c")}
        assert inner == {"/"}, "no thing has this id"
    assert said_id(DEFAULT_OWNER, "m") != said_id("alice", "m")


def test_paths_of_two_owners_are_two_and_print_alike() -> None:
    path = CheckpointPath.parse(TEXT)
    own = path.of("alice")
    assert own != path.of("bob") != path
    assert {str(path), str(own)} == {TEXT}
    assert (own.owner, path.owner) == ("alice", DEFAULT_OWNER)
    assert own.of(DEFAULT_OWNER) == path


def test_errors_and_folders_have_no_owner_in_the_way(tmp_path: Path) -> None:
    lost = model_lost("alice/m:1")
    assert "alice" not in lost.message
    assert lost.metadata["model_id"] == "m:1"
    name = DiskSnapshotStore(tmp_path).name("alice/m:1", 3, "0000")
    assert Path(name).name == name


def test_who_sees_what() -> None:
    """A server sees what the one sees for whom it asks; without keys nobody sees a tenant's."""
    server = Caller(ANY_OWNER, Scope.SERVER, "k")
    assert server.sees_all
    assert server.account == DEFAULT_OWNER
    for_alice = acting_for(server, "alice", {"tenant_models_max": 1})
    assert not for_alice.sees_all
    assert (for_alice.account, for_alice.search) == ("alice", "alice")
    assert for_alice.limit("tenant_models_max", 9) == 1
    admin = Caller("ops", Scope.ADMIN, "k")
    assert (admin.account, admin.search, admin.is_server) == ("ops", ANY_OWNER, True)
    assert not ANONYMOUS.sees_all
    assert ANONYMOUS.search == DEFAULT_OWNER
