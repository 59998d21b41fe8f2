"""Calls as values, for programs that pass them around; the clients' methods take the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tinsmith.types._values import Value
from tinsmith.types.inputs import AdamParams, Datum, LossFnType, ModelInput, SamplingParams
from tinsmith.types.tensor import TensorData


@dataclass(frozen=True, eq=False)
class ForwardBackwardInput(Value):
    """Arguments of `TrainingClient.forward_backward`."""

    data: list[Datum]
    loss_fn: LossFnType
    loss_fn_config: Mapping[str, float | str] | None = None


@dataclass(frozen=True, eq=False)
class ForwardBackwardRequest(Value):
    """`ForwardBackwardInput` for a model, with the call's number."""

    forward_backward_input: ForwardBackwardInput
    model_id: str
    seq_id: int | None = None


@dataclass(frozen=True, eq=False)
class OptimStepRequest(Value):
    """Arguments of `TrainingClient.optim_step` for a model, with the call's number."""

    optim_params: AdamParams
    model_id: str
    seq_id: int | None = None
    type: Literal["optim_step"] = "optim_step"


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleRequest(Value):
    """Arguments of `SamplingClient.sample`, and what it samples from."""

    prompt: ModelInput
    sampling_params: SamplingParams
    num_samples: int = 1
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool = False
    type: Literal["sample"] = "sample"
