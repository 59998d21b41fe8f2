"""Keys are guessed: every guess is refused, and how long that takes says nothing.

`make attack N=10000` guesses so often, and prints how likely the times of two kinds of guesses are
to be of one kind; a time decides no test.
"""

import math
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from attack.amount import SEED, amount
from tinsmith.keys import AUTHORIZATION, SCHEME
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint.server import CheckpointServer
from tinsmithd.config import CheckpointConfig
from tinsmithd.keys import KeyFile

GUESSES = 300
KEYS = 100
NEAR_DIGITS = 8
"""Characters in which a near guess differs from a good key."""


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A Checkpoint server of many tenants; its file of keys is `keys.json` beside its data."""
    keys = KeyFile(tmp_path / "keys.json")
    for number in range(KEYS):
        keys.create(f"tenant-{number}")
    config = CheckpointConfig(
        listen_address="127.0.0.1:0",
        data_folder=str(tmp_path / "data"),
        keys_file=str(keys.path),
        stop_grace_s=0,
    )
    server = CheckpointServer(config)
    await server.start()
    yield f"127.0.0.1:{server.port}"
    await server.stop()


def mann_whitney_p(one: np.ndarray, other: np.ndarray) -> float:
    """How likely two samples differ as much as these do if both are of one kind, two-sided.

    Mann and Whitney 1947, by the normal approximation; times hardly ever tie.
    """
    both = np.concatenate([one, other])
    ranks = np.empty(len(both))
    ranks[np.argsort(both, kind="stable")] = np.arange(1, len(both) + 1)
    n, m = len(one), len(other)
    u = ranks[:n].sum() - n * (n + 1) / 2
    z = (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return math.erfc(abs(z) / math.sqrt(2))


def test_two_samples_of_one_kind_are_told_from_two_kinds() -> None:
    """The measure itself."""
    rng = np.random.default_rng(SEED)
    one, same, later = rng.normal(size=2000), rng.normal(size=2000), rng.normal(0.2, size=2000)
    assert mann_whitney_p(one, same) > 0.05
    assert mann_whitney_p(one, later) < 1e-4


async def test_every_guess_is_refused(address: str, tmp_path: Path) -> None:
    """Random ones, and a good key with another end.

    Each is said once, or the connection's table of headers would make the second time quicker.
    """
    good = KeyFile(tmp_path / "keys.json").create("known").text
    count = amount(GUESSES)
    took_s: dict[str, list[float]] = {"near": [], "far": []}
    request = pb.CheckpointServiceGetCapabilitiesRequest()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = CheckpointServiceStub(channel)
        for number in range(count):
            kind = ("near", "far")[(number + number // 2) % 2]  # neither is always the first of two
            guess = "tml-" + secrets.token_urlsafe(32)
            if kind == "near":
                guess = good[:-NEAR_DIGITS] + guess[-NEAR_DIGITS:]
            begun_s = time.perf_counter()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetCapabilities(
                    request, metadata=((AUTHORIZATION, f"{SCHEME} {guess}"),)
                )
            took_s[kind].append(time.perf_counter() - begun_s)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert guess not in (refused.value.details() or "")
    near, far = (np.array(times) for times in took_s.values())
    p = mann_whitney_p(near, far)
    medians = np.median(near) * 1e6, np.median(far) * 1e6
    print(f"{count} guesses: medians {medians[0]:.0f} and {medians[1]:.0f} us, p = {p:.3f}")
