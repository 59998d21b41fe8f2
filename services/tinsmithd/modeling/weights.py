"""Which class of trained weights goes with each tuning."""

from collections.abc import Callable, Mapping

from tinsmithd.modeling.base import BaseModel
from tinsmithd.modeling.full import FullWeights
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.trained import TrainedWeights
from tinsmithd.tunings import FullConfig, LoraConfig, Tuning

MakeWeights = Callable[[BaseModel], TrainedWeights]
"""Makes what is trained of a base model, which may be changed in place."""

WEIGHTS: Mapping[type[Tuning], MakeWeights] = {LoraConfig: Adapters, FullConfig: FullWeights}
"""As engines that compute layer by layer train them."""

FUSED_WEIGHTS: Mapping[type[Tuning], MakeWeights] = {
    **WEIGHTS,
    LoraConfig: lambda base: Adapters(base, fused=True),
}
"""The same, with what is faster computed in one operation."""
