"""All that a rank imports before its first step, for the template that forks ranks.

A rank imports the same by itself, when it comes to it.
"""

import contextlib
import importlib

import peft  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import tinsmithd.trainer.commands
import tinsmithd.trainer.engines.deepspeed.engine
import tinsmithd.trainer.engines.factory
import tinsmithd.trainer.link  # noqa: F401

# DeepSpeed imports this, and with it torch's compiler, when the first optimizer is made.
with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
