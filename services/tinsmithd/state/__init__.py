"""A model's state as files: written, checked and read again."""
