"""Reads where an object store is, and what opens it, from the settings."""

import json
from pathlib import Path

from tinsmithd.checkpoint.opening import ObjectPlace
from tinsmithd.checkpoint.store import StoreUnusable
from tinsmithd.config import CheckpointConfig


def place_of(config: CheckpointConfig) -> ObjectPlace | None:
    """The object store of the settings; None where checkpoints are in the data folder.

    Raises:
        StoreUnusable: A file that the settings name cannot be used.
    """
    if not config.store_url:
        return None
    options = _options(config.store_options_file) if config.store_options_file else {}
    authorities = _read("store_ca_file", config.store_ca_file) if config.store_ca_file else b""
    if config.store_ca_file and b"-----BEGIN CERTIFICATE" not in authorities:
        message = f"store_ca_file {config.store_ca_file}: there is no certificate in it (PEM)"
        raise StoreUnusable(message)
    return ObjectPlace(config.store_url, options, config.store_grace_s, authorities)


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise StoreUnusable(f"{setting} {file}: {error.strerror}") from None


def _options(file: str) -> dict[str, str]:
    # Messages name the file, never what is in it.
    try:
        options = json.loads(_read("store_options_file", file))
    except ValueError:
        raise StoreUnusable(f"store_options_file {file} is no JSON") from None
    if not isinstance(options, dict) or not all(isinstance(v, str) for v in options.values()):
        raise StoreUnusable(f"store_options_file {file} must be one object of names and texts")
    return options
