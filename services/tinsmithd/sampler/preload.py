"""All that a Sampler imports before it loads a base model; see `trainer/preload.py`."""

import transformers.models.auto.modeling_auto  # noqa: F401

import tinsmithd.sampler.engines.transformers.engine
import tinsmithd.sampler.server  # noqa: F401
