"""The weights of a model in the form that the compiled part reads."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmithd.sampler.engines.transformers.model.shape import ModelShape
from tinsmithd.sampler.engines.transformers.native.abi import LayerOf, Library, Matrix, ModelOf

ANGLES_STEP = 1024
"""Positions whose angles are made together: always the same ones."""


class NativeModel:
    """A copy of a model's weights, bfloat16 where that is exact and else float32.

    Args:
        kernels: What computes with them.
        model: A causal language model of transformers that `can_take` holds for; it is left alone.

    Attributes:
        kernels: As given.
        shape: Its sizes. Of its dtype are keys and values; where that is bfloat16, all that one
            operation gives to the next is rounded to it.
        each: What the compiled part is given.
        head: Makes logits.
        embedding: `(vocab, hidden)`, in the model's dtype.
    """

    @torch.inference_mode()
    def __init__(self, kernels: Library, model: Any) -> None:
        self.kernels, self.shape = kernels, ModelShape.of(model)
        self._kept: list[Tensor] = []
        """Memory that the structures point to."""
        self._rotary = model.model.rotary_emb
        self._angles = torch.empty((0, self.shape.head_dim))
        layers = model.model.layers
        self._layers = (LayerOf * len(layers))()
        for index, layer in enumerate(layers):
            self._layers[index] = self._layer(layer, index)
        self.embedding = model.get_input_embeddings().weight.detach()
        self.head = self._matrix([model.get_output_embeddings()])
        norm, first = model.model.norm, layers[0]
        qk_norm = getattr(first.self_attn, "q_norm", norm)
        self.each = ModelOf(
            layers=len(layers),
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            hidden=self.shape.hidden,
            ffn=first.mlp.gate_proj.out_features,
            narrow=self.shape.dtype == torch.bfloat16,
            eps=norm.variance_epsilon,
            qk_eps=qk_norm.variance_epsilon,
            scaling=self.shape.scaling,
            each=self._layers,
            norm=self._floats(norm.weight),
        )

    @staticmethod
    def can_take(model: Any) -> bool:
        """Whether the compiled part computes what a model does: dense layers on a CPU.

        Its keys and values are of the model's dtype, float32 or bfloat16.
        """
        weight = model.get_input_embeddings().weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        if model.config.hidden_act not in ("silu", "swish"):
            return False
        eps, ffns = model.model.norm.variance_epsilon, set()
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                return False
            ffns.add(layer.mlp.gate_proj.out_features)
            if layer.input_layernorm.variance_epsilon != eps:
                return False
        return len(ffns) == 1

    def angles(self, positions_T: Tensor) -> Tensor:
        """Cosines, then sines, of half a head at positions: float32 `(T, head_dim)`.

        They are rounded to the shape's dtype.
        """
        while (start := len(self._angles)) <= int(positions_T.max()):
            places = torch.arange(start, start + ANGLES_STEP)
            cos, sin = self._rotary(torch.empty(0, dtype=self.shape.dtype), places[None])
            half = self.shape.head_dim // 2
            more = torch.cat((cos[0, :, :half], sin[0, :, :half]), 1).float()
            self._angles = torch.cat((self._angles, more))
        return self._angles.index_select(0, positions_T)

    def _layer(self, layer: Any, index: int) -> LayerOf:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norm_q, norm_k = (None if n is None else self._floats(n.weight) for n in qk_norms)
        return LayerOf(
            qkv=self._matrix([attention.q_proj, attention.k_proj, attention.v_proj]),
            o=self._matrix([attention.o_proj]),
            gate=self._matrix([mlp.gate_proj]),
            up=self._matrix([mlp.up_proj]),
            down=self._matrix([mlp.down_proj]),
            norm_1=self._floats(layer.input_layernorm.weight),
            norm_2=self._floats(layer.post_attention_layernorm.weight),
            norm_q=norm_q,
            norm_k=norm_k,
            window=self.shape.windows[index] or 0,
        )

    def _matrix(self, modules: Sequence[Any]) -> Matrix:
        """One weight of linear layers below each other."""
        weight = torch.cat([module.weight.detach() for module in modules])
        wide = weight.float()
        narrow = weight.dtype == torch.bfloat16 or torch.equal(wide.bfloat16().float(), wide)
        panels = self.kernels.packed(wide, narrow=narrow)
        self._kept.append(panels)
        biases = [module.bias for module in modules if module.bias is not None]
        bias = self._floats(torch.cat(biases)) if biases else None
        return Matrix(panels.data_ptr(), bias, *weight.shape, narrow)

    def _floats(self, tensor: Tensor) -> int:
        """The address of a float32 copy."""
        made = tensor.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(made)
        return made.data_ptr()


def pointer_array(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p]":
    """Addresses as C has them."""
    return (ctypes.c_void_p * len(addresses))(*addresses)
