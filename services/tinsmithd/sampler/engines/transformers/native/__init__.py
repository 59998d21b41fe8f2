"""A compiled forward of a whole decoder for CPUs: one call for a step, no torch within it."""

from tinsmithd.sampler.engines.transformers.native.compiling import can_be_had, load_library
from tinsmithd.sampler.engines.transformers.native.decoder import NativeDecoder
from tinsmithd.sampler.engines.transformers.native.draws import NativeWorkspace
from tinsmithd.sampler.engines.transformers.native.model import NativeModel

__all__ = ["NativeDecoder", "NativeModel", "NativeWorkspace", "can_be_had", "load_library"]
