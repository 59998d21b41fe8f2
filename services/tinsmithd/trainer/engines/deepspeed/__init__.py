"""The engine of many ranks: ZeRO holds models and the base, packed micro-batches compute."""
