"""The tools themselves: a harness that could not fail would prove nothing."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from faults.harness import ONCE
from faults.operations import call_once
from faults.peer import Peer, after, unavailable
from faults.proxy import DUPLICATE, FAULTS, ChaosProxy
from faults.report import Outcome, Report
from tinsmith import v1 as pb

TWIN = Outcome(["forward 1 a", "optim_step 1 b", "saved final"], {"adapter": b"abc"}, steps=1)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(replace(TWIN, lines=["forward 1 x", *TWIN.lines[1:]]), id="another value"),
        pytest.param(replace(TWIN, lines=TWIN.lines[:-1]), id="a value is missing"),
        pytest.param(replace(TWIN, files={"adapter": b"abd"}), id="another file"),
    ],
)
def test_a_difference_is_found(found: Outcome) -> None:
    """In one bit of a value, in their number, or in a file; and nothing where there is none."""
    report = Report()
    report.compare("script", TWIN, TWIN, steps=1)
    assert report.differences == []
    report.compare("script", found, TWIN, steps=1)
    assert len(report.differences) == 1


def test_steps_that_are_lost_or_done_twice_are_counted() -> None:
    """By what the saved checkpoint says of itself."""
    report = Report()
    report.compare("script", replace(TWIN, steps=3), TWIN, steps=5)
    report.compare("script", replace(TWIN, steps=6), TWIN, steps=5)
    assert (report.lost, report.twice) == (2, 1)


def test_a_failpoint_is_given_to_one_process(tmp_path: Path) -> None:
    """Of the right kind; the one that is started after it has none."""
    (tmp_path / "checkpoint").write_text("recv:kill@1")
    environment = {**os.environ, "PYTHONPATH": ONCE, "TINSMITH_TEST_ONCE": str(tmp_path)}
    code = "import os; print(os.environ.get('TINSMITH_FAILPOINTS'))"

    def start(kind: str) -> str:
        # What the interpreter was called with decides, so a process that ends at once will do.
        command = [sys.executable, "-c", code, "-m", f"tinsmithd.{kind}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [start(kind) for kind in ("training", "checkpoint", "checkpoint")] == [
        *("None", "recv:kill@1", "None")
    ]
    assert (tmp_path / "checkpoint.claimed").read_text().isdigit()


async def test_the_proxy_does_the_same_to_the_same_calls() -> None:
    """Whatever the order of arrival: it depends on the seed and the call."""
    peer = Peer()
    done = []
    for _ in range(2):
        async with ChaosProxy(peer.address, seed=3, share=1.0, delay_s_max=0) as proxy:
            async with grpc.aio.insecure_channel(proxy.address) as channel:
                numbers = range(1, 30) if not done else range(29, 0, -1)
                for number in numbers:
                    request = pb.GetModelRequest(model_id=f"m{number}").SerializeToString()
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await call_once(channel, "GetModel", request)
            done.append(proxy.done)
    peer.stop()
    assert done[0] == done[1]
    assert set(done[0]) == set(FAULTS)


async def test_the_proxy_finds_two_answers_to_one_call() -> None:
    """A peer that forgets what it answered is caught, one that only stops in between is not."""
    peer = Peer()
    peer.servicer.model.state_message = "first"
    async with (
        ChaosProxy(peer.address, seed=1, share=1.0, faults=[DUPLICATE]) as proxy,
        grpc.aio.insecure_channel(proxy.address) as channel,
    ):
        peer.servicer.before[1] = [after(0.0, unavailable)]
        step = pb.OptimStepRequest(model_id="m", seq_id=1).SerializeToString()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call_once(channel, "OptimStep", step)
        assert proxy.differences == []
        peer.servicer.forgetful = True
        await call_once(channel, "GetModel", pb.GetModelRequest(model_id="m").SerializeToString())
        assert len(proxy.differences) == 1
    peer.stop()
