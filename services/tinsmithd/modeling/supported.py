"""Checks that this cluster computes a model as its configuration means it; else it is refused.

Training computes data side by side in one forward (`packing`), sampling computes token by token. A
model is served only if both can do what it asks for.
"""

from typing import Any

import torch

from tinsmithd.modeling.weight_files import refused, shown

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Architectures whose LoRA targets and numbers the conformance suite checks."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of layers that packed attention keeps inside each segment."""

_NEAR = 8
"""Number of positions whose angles are compared, with and without a far one beside them."""


def check_config(name: str, config: Any) -> None:
    """Refuse a configuration with an entry that is not supported, before weights are read.

    Raises:
        NotFound: See above (BASE_MODEL_NOT_FOUND).
    """
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise refused(name, f"architecture {config.model_type!r} is not one of {known}")
    layer_types = getattr(config, "layer_types", None) or []
    if foreign := sorted(set(layer_types) - set(LAYER_TYPES)):
        known = ", ".join(LAYER_TYPES)
        raise refused(name, f"layer_types: {shown(foreign)}, which are not one of {known}")
    if "sliding_attention" in layer_types and not getattr(config, "sliding_window", None):
        message = "layer_types: sliding_attention, but use_sliding_window and sliding_window set no"
        raise refused(name, f"{message} window")


def has_windows(config: Any) -> bool:
    """Whether a layer sees a bounded number of tokens back."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return bool(getattr(config, "sliding_window", None))


def check_positions(name: str, model: Any) -> None:
    """Refuse a model in which a position's angles depend on how long the sequence is.

    In such a model, data that are computed together would change each other's numbers, and so would
    a token that is sampled later those that were cached before.

    Args:
        name: Of the model.
        model: The model; its weights may be on the meta device.

    Raises:
        NotFound: See above (BASE_MODEL_NOT_FOUND).
    """
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is None:
        return
    device = rotary.inv_freq.device
    near = torch.arange(_NEAR, device=device)
    farthest = torch.tensor([model.config.max_position_embeddings - 1], device=device)
    values = torch.zeros(1, dtype=torch.float32, device=device)
    with torch.no_grad():
        alone = rotary(values, near[None])
        beside = rotary(values, torch.cat([near, farthest])[None])
        again = rotary(values, near[None])
    for first, second, third in zip(alone, beside, again, strict=True):
        if not (torch.equal(first, second[:, :_NEAR]) and torch.equal(first, third)):
            kind = (model.config.rope_parameters or {}).get("rope_type")
            message = f"rope_type: {kind!r} turns a position by an angle that depends on the length"
            raise refused(name, f"{message} of its sequence, which is not supported")
