"""The embedded engine: transformers with PEFT adapters."""
