"""Base models as transformers has them, and what of them is trained; for trainer and Sampler."""
