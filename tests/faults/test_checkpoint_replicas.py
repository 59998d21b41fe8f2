"""Checkpoint servers over one real S3: who wins, what a death leaves, what a lost disk costs."""

import contextlib
import itertools
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil
import pytest

import object_stores
import programs
import tinsmith
from checkpoints import PATH, ServerProcess, commit, files, messages
from faults.amount import amount
from object_stores import SeaweedFS
from tinsmith import v1 as pb
from tinsmith.connection import Connection
from tinsmithd.checkpoint.opening import ObjectPlace
from tinsmithd.checkpoint_client import CheckpointClient
from tinsmithd.domain import CheckpointPath

AFTER_COMMIT = "ckpt_post_commit"
FAILPOINTS = (
    "ckpt_mid_write",
    "ckpt_pre_fsync",
    "ckpt_pre_rename",
    "ckpt_post_rename",
    AFTER_COMMIT,
)
"""The store is told of a file while pieces come, has all files, and then the entry of the log."""


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3."""
    with object_stores.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as running:
        yield running


@pytest.fixture(scope="module")
def place(seaweedfs: SeaweedFS) -> ObjectPlace:
    """Where the servers of these tests have their checkpoints."""
    return seaweedfs.place()


@pytest.fixture(scope="module")
def pair(
    place: ObjectPlace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that live through these tests."""
    folder = tmp_path_factory.mktemp("pair")
    with (
        ServerProcess(folder / "a", place=place) as a,
        ServerProcess(folder / "b", place=place) as b,
    ):
        yield a, b


def test_of_saves_of_one_name_at_two_servers_one_wins(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    """The others are told that it exists, and both servers give what the winner sent."""

    def save(index: int) -> bool:
        try:
            pair[index % 2].write(files(index), name)
        except grpc.RpcError as error:
            refusals.append(error.code())
            return False
        return True

    with ThreadPoolExecutor(6) as beside:
        for round_ in range(3):
            name, refusals = f"{PATH}-race-{round_}", []
            won = list(beside.map(save, range(6)))
            assert won.count(True) == 1
            assert set(refusals) == {grpc.StatusCode.ALREADY_EXISTS}
            for server in pair:
                assert server.read(name) == files(won.index(True))


def test_a_save_is_found_at_the_other_server_at_once(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    for index in range(6):
        written = pair[index % 2].write(files(index), PATH + "-found", overwrite=True)
        found = pair[1 - index % 2].get(PATH + "-found")
        assert found.digest == written.digest


def test_a_watcher_is_told_of_what_another_server_committed(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    watch = pair[0].stub.WatchCheckpoints(pb.WatchCheckpointsRequest(), timeout=60)
    assert next(watch) == pb.WatchCheckpointsResponse()
    written = pair[1].write(files(1), PATH + "-watched")
    told = next(watch).checkpoint
    assert (told.checkpoint_path, told.digest) == (PATH + "-watched", written.digest)
    watch.cancel()


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_death_during_an_upload_leaves_nothing_to_see(
    pair: tuple[ServerProcess, ServerProcess], place: ObjectPlace, tmp_path: Path, failpoint: str
) -> None:
    """And whoever saves again, by the same request, has it once."""
    name, content, request = f"{PATH}-{failpoint}", files(3), f"request-{failpoint}"
    other = pair[0]
    before = other.paths()
    with ServerProcess(tmp_path / "dies", failpoint + ":kill", place=place) as server:
        with pytest.raises(grpc.RpcError):
            server.write(content, name, request_id=request)
        assert server.wait() == -signal.SIGKILL, f"{failpoint} was not reached"
    committed = failpoint == AFTER_COMMIT
    assert other.paths() == ([name] if committed else []) + before
    other.write(content, name, request_id=request)
    assert other.paths() == [name, *before]
    assert other.read(name) == content


def test_a_stream_that_breaks_leaves_nothing(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    """Without its commit, and with a commit of other bytes."""
    sent = list(messages(PATH + "-broken", files(4)))
    for stream in (sent[:-1], [*sent[:-1], commit(files(5))]):
        with pytest.raises(grpc.RpcError):
            pair[0].stub.WriteCheckpoint(iter(stream), timeout=60)
        assert PATH + "-broken" not in pair[1].paths()


def test_a_server_that_lost_its_disk_knows_all_again(
    pair: tuple[ServerProcess, ServerProcess], place: ObjectPlace, tmp_path: Path
) -> None:
    """From the store alone; and the other one goes on meanwhile."""
    folder = tmp_path / "lost"
    with ServerProcess(folder, place=place) as server:
        server.write(files(7), PATH + "-kept")
        server.kill()
    shutil.rmtree(folder)
    pair[0].write(files(8), PATH + "-meanwhile")
    with ServerProcess(folder, place=place) as server:
        assert server.paths() == pair[0].paths()
        assert server.read(PATH + "-kept") == files(7)
        assert server.read(PATH + "-meanwhile") == files(8)


def test_no_acknowledged_save_is_lost_or_made_twice_whenever_servers_die(
    place: ObjectPlace, tmp_path: Path
) -> None:
    """Writers try again at the other server, by the same request, until they are answered."""
    servers = {name: ServerProcess(tmp_path / name, place=place) for name in "cd"}
    killed, saved = threading.Event(), list[str]()

    def save(writer: int) -> None:
        count = 0
        while not killed.is_set() or count < 3:
            name, count = f"{PATH}-dying-{writer}-{count}", count + 1
            for attempt in itertools.count(writer):
                server = servers["cd"[attempt % 2]]
                with contextlib.suppress(grpc.RpcError, ValueError):  # one that is being replaced
                    server.write(files(writer), name, request_id=name)
                    break
            saved.append(name)

    try:
        with ThreadPoolExecutor(4) as beside:
            writers = [beside.submit(save, writer) for writer in range(4)]
            for death in range(amount(2, full=30)):
                name = "cd"[death % 2]
                enough = len(saved) + 5
                while len(saved) < enough:
                    assert not any(writer.done() for writer in writers)
                    time.sleep(0.01)
                servers[name].kill()
                servers[name] = ServerProcess(tmp_path / name, place=place)
            killed.set()
            for writer in writers:
                writer.result(60)
        for server in servers.values():
            listed = [found for found in server.paths(page_size=1000) if "-dying-" in found]
            assert sorted(listed) == sorted(saved)
            for name in saved[:: max(len(saved) // 20, 1)]:
                assert server.read(name) == files(int(name.split("-")[-2]))
    finally:
        for server in servers.values():
            server.kill()


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        content: bytes = answer.read()
        return content


def test_files_are_read_by_url_without_the_server_for_a_while(
    seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    """Whole, by whoever has the URL, not after its time, and not under another name."""
    settings = {"TINSMITH_CHECKPOINT_DOWNLOAD_URL_TTL_S_MAX": "60"}
    with (
        programs.environment(**settings),
        ServerProcess(tmp_path / "a", place=seaweedfs.place()) as server,
    ):
        server.write(files(0))
        request = pb.GetCheckpointRequest(checkpoint_path=PATH)
        found = server.stub.GetCheckpoint(request).checkpoint.files
        assert not any(file.download_url for file in found)
        request.download_url_ttl.FromSeconds(1000)
        found = server.stub.GetCheckpoint(request).checkpoint.files
        request.download_url_ttl.FromSeconds(1)
        short = server.stub.GetCheckpoint(request).checkpoint.files[0].download_url
    urls = {file.name: file.download_url for file in found}
    assert {name: fetched(url) for name, url in urls.items()} == files(0)
    first, second, *_ = urls.values()
    swapped = first.partition("?")[0] + "?" + second.partition("?")[2]
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetched(swapped)
    assert caught.value.code == 403
    assert "X-Amz-Expires=60" in first  # what is longer than the setting means that
    assert "X-Amz-Expires=1&" in short
    with pytest.raises(urllib.error.HTTPError) as caught:
        deque(iter(lambda: fetched(short), b""), maxlen=0)  # again and again, until it is over
    assert caught.value.code == 403


class Straight(Connection):
    """A connection to a Checkpoint server that no Training server names."""

    async def _address_of(self, service: str) -> str:
        return self.address


def test_a_client_gets_urls_of_external_weights_from_the_store_itself(
    seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    """What PEFT reads, without a gateway."""
    settings = {"TINSMITH_CHECKPOINT_DOWNLOAD_URL_TTL_S_MAX": "60"}
    with (
        programs.environment(**settings),
        ServerProcess(tmp_path / "a", place=seaweedfs.place()) as server,
    ):
        content = files(0, optimizer=False)
        server.write(content, "tinsmith://run/sampler_weights/external.e")
        rest = tinsmith.RestClient(Straight(server.address))
        found = rest.get_external_weights_urls("tinsmith://run/external_weights/e").result(30)
        with pytest.raises(tinsmith.NotFoundError):
            rest.get_external_weights_urls("tinsmith://run/external_weights/absent").result(30)
    wanted = ("adapter_model.safetensors", "adapter_config.json")
    got = {name: fetched(url) for name, url in found.urls.items()}
    assert got == {name: content[name] for name in wanted}
    assert 0 < (found.expires - datetime.now(UTC)).total_seconds() <= 60


def connections(server: ServerProcess) -> int:
    return len(psutil.Process(server.pid).net_connections("tcp"))


async def test_a_read_goes_on_at_another_server_when_its_own_dies(
    place: ObjectPlace, tmp_path: Path
) -> None:
    """By the cluster's own client, which knows both by one address; so does the next call."""
    content = files(9, columns=1_000_000)
    path = CheckpointPath.parse(PATH + "-moves")
    with (
        ServerProcess(tmp_path / "a", place=place) as a,
        ServerProcess(tmp_path / "b", place=place) as b,
    ):
        a.write(content, str(path), piece_bytes=1 << 20)
        b.get(str(path))
        before = connections(a)
        client = CheckpointClient(f"ipv4:{a.address},{b.address}")
        got: dict[str, bytes] = {}
        async with client.reader(path) as reading:
            victim = a if connections(a) > before else b
            async for name, data in reading.pieces():
                if not got:
                    victim.kill()
                got[name] = got.get(name, b"") + data
        assert got == content
        assert (await client.get(path)).path == path
        await client.close()


@pytest.mark.skipif(not amount(0, full=1), reason="part of `make faults`")
def test_a_store_that_is_away_is_said_and_comes_back_by_itself(tmp_path: Path) -> None:
    """Reads, writes and health say UNAVAILABLE within their time; nothing is taken for absent."""
    with object_stores.seaweedfs(tmp_path / "seaweedfs") as running:
        place = running.place()
        with ServerProcess(tmp_path / "server", place=place) as server:
            server.write(files(0))
            running.stop()
            for call in (server.get, server.read, server.paths, lambda: server.write(files(1))):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            running.start()
            assert server.read() == files(0)
            server.write(files(1), overwrite=True)
            assert server.read() == files(1)
