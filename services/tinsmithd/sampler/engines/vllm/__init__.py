"""The engine for GPUs in production: vLLM with LoRA. Imported only where it is chosen."""
