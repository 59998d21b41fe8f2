"""The base model's tokenizer, from the Sampler, kept on disk by what it holds."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinsmith._connection import SAMPLER, Connection
from tinsmith._replicas import Work
from tinsmith.v1 import sampler_service_pb2 as pb

if TYPE_CHECKING:
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub


def cache_folder() -> Path:
    """`TINSMITH_CACHE`, or `~/.cache/tinsmith`."""
    return Path(os.environ.get("TINSMITH_CACHE", Path.home() / ".cache" / "tinsmith"))


async def fetch_tokenizer(connection: Connection, base_model: str) -> Path:
    """Download a tokenizer's files, unless they are here; returns their folder."""
    request = pb.GetTokenizerRequest(base_model=base_model)

    async def make(sampler: "SamplerServiceAsyncStub") -> dict[str, bytearray]:
        files: dict[str, bytearray] = {}
        async for response in sampler.GetTokenizer(request):
            files.setdefault(Path(response.file_name).name, bytearray()).extend(response.data)
        return files

    attempt = functools.partial(connection.on_a_sampler, Work(), make)
    files = await connection.retrying("get_tokenizer", attempt, service=SAMPLER)
    content = hashlib.sha256()
    for name in sorted(files):
        content.update(name.encode() + hashlib.sha256(files[name]).digest())
    folder = cache_folder() / "tokenizers" / content.hexdigest()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = Path(scratch) / "tokenizer"
            part.mkdir()
            for name, data in files.items():
                (part / name).write_bytes(data)
            try:
                part.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Read a tokenizer with transformers.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("get_tokenizer needs transformers: pip install transformers") from error
    return AutoTokenizer.from_pretrained(folder)
