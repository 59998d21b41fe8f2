"""The Checkpoint server: the only process that writes checkpoints."""
