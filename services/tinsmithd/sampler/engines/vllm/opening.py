"""The way into this engine: vLLM is imported only here, and only when it is wanted."""

import importlib.util
import os

from tinsmithd.sampler.engines.interface import SamplingEngine
from tinsmithd.sampler.engines.vllm.settings import OWNER_VARIABLE as OWNER_VARIABLE
from tinsmithd.sampler.engines.vllm.settings import VllmSettings as VllmSettings

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    # A process that has called gRPC or an accelerator cannot be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The one that `scoring` mends.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # A prompt that fills the context is scored by making one token more, which nothing reads.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
"""What vLLM reads when it is imported, unless somebody has said otherwise."""


def is_installed() -> bool:
    """Whether there is a vLLM to import."""
    return importlib.util.find_spec("vllm") is not None


def open_engine(base_model: str, settings: VllmSettings) -> SamplingEngine:
    """Start vLLM and load a base model; takes seconds to minutes.

    Args:
        base_model: Hugging Face name or folder.
        settings: See there.

    Raises:
        ImportError: vLLM is not installed.
        NotFound: There is no such model, or something in it is not supported
            (BASE_MODEL_NOT_FOUND).
        RuntimeError: vLLM did not start; its log says why.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    from tinsmithd.sampler.engines.vllm.engine import VllmEngine

    return VllmEngine(base_model, settings)
