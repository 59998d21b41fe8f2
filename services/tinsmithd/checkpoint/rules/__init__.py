"""What may happen to checkpoints: how store and catalogue move together."""
