"""What computes the batches and steps of models, on all ranks alike."""
