"""The users of a cluster under test: scripts in processes of their own, and what they leave."""

import subprocess
import sys
import time
from pathlib import Path

import grpc

from faults.report import Outcome
from tinsmith import v1 as pb

SCRIPT = Path(__file__).parent / "script.py"
COMPARED_FILES = ("adapter_model.safetensors", "optimizer.safetensors")
DELETE_S_MAX = 120.0


class Script:
    """One user's script as a process; it is ended with the round at the latest."""

    def __init__(
        self, address: str, base_model: str, index: int, folder: Path, *options: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"script-{index}.log"
        self._errors = folder / f"script-{index}.err"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, str(SCRIPT), "--address", address),
                    *("--base-model", base_model, "--seed", str(index + 1)),
                    *("--log", str(self.log), *options),
                ],
                stderr=errors,
            )

    @property
    def running(self) -> bool:
        """True until it ends."""
        return self._process.poll() is None

    def wait(self, most_s: float) -> None:
        """Wait until it ends.

        Raises:
            RuntimeError: It failed.
        """
        status = self._process.wait(most_s or None)
        if status:
            raise RuntimeError(f"a script failed ({status}):\n{self._errors.read_text()[-3000:]}")

    def end(self) -> None:
        """End it now, if it still runs."""
        if self.running:
            self._process.kill()
            self._process.wait()

    def outcome(self, checkpoint_address: str) -> Outcome:
        """What it left."""
        path = Path(f"{self.log}.path").read_text()
        with grpc.insecure_channel(checkpoint_address) as channel:
            stub = pb.CheckpointServiceStub(channel)
            info = stub.GetCheckpoint(
                pb.GetCheckpointRequest(checkpoint_path=path), wait_for_ready=True
            )
        kept = read_files(checkpoint_address, path)
        lines = self.log.read_text().splitlines()
        return Outcome(lines, kept, int(info.checkpoint.step_count))


def read_files(checkpoint_address: str, path: str) -> dict[str, bytes]:
    """The files of a checkpoint that are compared; one for the Sampler has no optimizer's."""
    files: dict[str, bytearray] = {}
    with grpc.insecure_channel(checkpoint_address) as channel:
        stub = pb.CheckpointServiceStub(channel)
        for response in stub.ReadCheckpoint(pb.ReadCheckpointRequest(checkpoint_path=path)):
            if response.HasField("piece"):
                files.setdefault(response.piece.file_name, bytearray()).extend(response.piece.data)
    return {name: bytes(files[name]) for name in COMPARED_FILES if name in files}


def delete_models(address: str) -> None:
    """Delete all of them: the next round has its own."""
    give_up_s = time.monotonic() + DELETE_S_MAX
    with grpc.insecure_channel(address) as channel:
        stub = pb.TrainingServiceStub(channel)
        while True:
            try:
                models = stub.ListModels(pb.ListModelsRequest(), timeout=30).models
                for model in models:
                    stub.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id), timeout=30)
                return
            except grpc.RpcError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.1)
