"""What checkpoints are called, and how one is marked: the same for this client and the gateway.

    tinsmith://<run>/external_weights/<name>   is stored as
    tinsmith://<run>/sampler_weights/external.<name>

External weights are what a Sampler's are: a folder for PEFT or for transformers. Only their name
tells them apart.
"""

EXTERNAL_PREFIX = "external."
PUBLIC_MARK = "tinsmith.public"
"""Key of a checkpoint's metadata that says that it was published."""
OWN_FILES = ("model_state.json", "optimizer.safetensors")
"""Files of a checkpoint that only this cluster reads."""
_SHOWN, _STORED = "/external_weights/", f"/sampler_weights/{EXTERNAL_PREFIX}"


def stored(path: str) -> str:
    """A path as the Checkpoint server has it; what is none is left as it is."""
    run, kind, name = path.rpartition(_SHOWN)
    return f"{run}{_STORED}{name}" if kind and name else path


def shown(path: str) -> str:
    """A path of the Checkpoint server's, as programs read it."""
    run, kind, name = path.rpartition(_STORED)
    return f"{run}{_SHOWN}{name}" if kind and name else path
