"""Checkpoints in an object store (S3, GCS, Azure, a folder), which several servers may share."""
