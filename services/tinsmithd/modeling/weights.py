"""The class of trained weights of each tuning."""

from collections.abc import Callable, Mapping

from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.full import FullWeights
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.trained import TrainedWeights
from tinsmithd.tunings import FullConfig, LoraConfig, Tuning

MakeWeights = Callable[[BaseModel], TrainedWeights]
"""Makes the trained weights on a base model, which it may change in place."""

WEIGHTS: Mapping[type[Tuning], MakeWeights] = {LoraConfig: Adapters, FullConfig: FullWeights}
"""For the reference engine: PEFT's own layers."""

FUSED_WEIGHTS: Mapping[type[Tuning], MakeWeights] = {
    **WEIGHTS,
    LoraConfig: lambda base: Adapters(base, fused=True),
}
"""For the DeepSpeed engine: fused layers where there are such."""
