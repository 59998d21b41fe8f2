"""Where the bytes of checkpoints are: `interface.py` says how, the other files keep them."""
