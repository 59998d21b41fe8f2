"""The arithmetic: forwards, losses, gradients and steps of some data, on one process."""
