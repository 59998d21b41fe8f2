"""A Sampler whose base model has a tokenizer of the Llama-2 kind, with files of transformers 4."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from tinsmith.tensors import decode
from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceStub
from tinsmithd.config import SamplerConfig
from tinsmithd.sampler.server import SamplerServer
from tiny_models import write_tiny_model
from tokenizers_for_tests import llama2_tokenizer, write_llama2_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama-2")


@pytest.fixture(scope="module")
def tokenizer_files(base: Path) -> dict[str, bytes]:
    return write_llama2_tokenizer(base)


@pytest.fixture
async def sampler(base: Path, tokenizer_files: object) -> AsyncIterator[SamplerServiceStub]:
    settings = {"listen_address": "127.0.0.1:0", "stop_grace_s": 1.0, "threads": 1}
    server = SamplerServer(SamplerConfig(base_model=str(base), **settings))  # type: ignore[arg-type]
    await server.start()
    await server.loaded()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield SamplerServiceStub(channel)
    await server.stop()


async def test_tokenizer_files_are_handed_out_unchanged(
    sampler: SamplerServiceStub, base: Path, tokenizer_files: dict[str, bytes]
) -> None:
    """Byte for byte those of the base's folder, whatever this server's transformers would write."""
    got: dict[str, bytes] = {}
    async for response in sampler.GetTokenizer(pb.GetTokenizerRequest()):
        got[response.file_name] = got.get(response.file_name, b"") + response.data
    assert got == {**tokenizer_files, "config.json": (base / "config.json").read_bytes()}


async def test_a_stop_string_with_a_space_ends_a_completion_at_its_first_token(
    sampler: SamplerServiceStub,
) -> None:
    """Text of a completion is what it adds to the text of the prompt."""
    tokenizer = llama2_tokenizer()
    chunk = types_pb2.ModelInputChunk(tokens=types_pb2.Tensor(ints=tokenizer.encode("a b").ids))

    async def sample(*stop: str) -> list[tuple[list[int], int]]:
        request = pb.SampleRequest(
            prompt=types_pb2.ModelInput(chunks=[chunk]),
            num_samples=64,
            sampling_params=pb.SamplingParams(
                max_tokens=3, seed=1, stop=pb.StopCondition(strings=stop)
            ),
        )
        made: list[tuple[list[int], int]] = [([], 0)] * 64
        async for response in sampler.Sample(request):
            for delta in response.deltas:
                tokens = made[delta.sequence_index][0] + decode(delta.tokens).tolist()
                made[delta.sequence_index] = (tokens, delta.stop_reason)
        return made

    free = await sample()
    pieces = [tokenizer.id_to_token(tokens[0]) or "" for tokens, _ in free]
    index, piece = next((i, p) for i, p in enumerate(pieces) if p.startswith("▁") and p != "▁")
    stopped = (await sample(piece.replace("▁", " ")))[index]
    assert stopped == (free[index][0][:1], pb.STOP_REASON_STOP)
