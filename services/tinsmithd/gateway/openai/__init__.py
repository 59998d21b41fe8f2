"""OpenAI's HTTP API over the Sampler: completions, chats, models."""

from tinsmithd.gateway.openai.endpoints import PREFIXES, routes
from tinsmithd.gateway.openai.errors import error_response

__all__ = ["PREFIXES", "error_response", "routes"]
