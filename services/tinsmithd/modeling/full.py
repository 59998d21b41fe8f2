"""All weights of a base model, trained: full fine-tuning, without an adapter."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tinsmithd.domain import FullConfig, Tuning
from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.trained import HeadLayer, TrainedWeights
from tinsmithd.state.files import TOKENIZER_FILES


class FullWeights(TrainedWeights):
    """All weights of one base model, under one key.

    Args:
        base: The base model, held in float32; it is changed in place.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._key: str | None = None

    def tuning(self, key: str) -> Tuning:
        """Full fine-tuning."""
        assert key == self._key
        return FullConfig()

    def add(self, key: str, tuning: Tuning) -> None:
        """Begin to train the base.

        Raises:
            ValueError: It is trained already, or the tuning is another one.
        """
        if self._key is not None or not isinstance(tuning, FullConfig):
            raise ValueError("a base is trained once, and without an adapter")
        self._base.model.requires_grad_(True)
        self._key = key

    def remove(self, key: str) -> None:
        """Stop training; the base keeps its present values."""
        if key == self._key:
            self._base.model.requires_grad_(False)
            self._key = None

    @staticmethod
    def first_values(shapes: Mapping[str, Sequence[int]], tuning: Tuning) -> None:
        """Return None, since a full model begins with the values of the base."""

    @contextlib.contextmanager
    def active(self, key: str | None) -> Iterator[Any]:
        """The causal language model."""
        assert key == self._key
        yield self._base.model

    def head(self, key: str | None) -> HeadLayer:
        """The model's head, whose weight is trained."""
        return HeadLayer(self._base.model.get_output_embeddings(), trained=True)

    def parameters(self, key: str) -> dict[str, torch.nn.Parameter]:
        """The weights by Hugging Face's names, sorted; shared weights are there once."""
        return dict(sorted(self._base.model.named_parameters()))

    def config(self, key: str) -> dict[str, Any]:
        """The content of `config.json`, with which transformers loads the weights."""
        model = self._base.model
        config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
        # `load_base` switched the cache off; without the entry a model has its default again.
        for name in ("use_cache", "_name_or_path", "_attn_implementation", "attn_implementation"):
            config.pop(name, None)
        return {**config, "architectures": [type(model).__name__], "dtype": "float32"}

    def files(self, key: str) -> dict[str, bytes]:
        """The files of the tokenizer, as the base model has them."""
        found = self._base.tokenizer_files
        return {name: found[name] for name in TOKENIZER_FILES if name in found}
