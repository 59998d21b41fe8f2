"""The Sampler: continuations and logprobs of a base model, with or without an adapter."""
