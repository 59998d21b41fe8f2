"""The gateway: HTTP for stock Tinker SDKs and OpenAI clients, one more client of the stubs."""
