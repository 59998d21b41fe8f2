"""OpenAI's HTTP API over the Sampler: completions, chats, models."""

from tinsmithd.gateway.openai.endpoints import routes

__all__ = ["routes"]
