"""What checkpoints exist, who may write them, and until when they live: one SQLite file."""
