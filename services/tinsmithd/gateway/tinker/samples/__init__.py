"""Sampling for the stock SDK: sessions and promises whose ids say what they are."""

from tinsmithd.gateway.tinker.samples.routes import routes
from tinsmithd.gateway.tinker.samples.weights import SamplingSession, Weights

__all__ = ["SamplingSession", "Weights", "routes"]
