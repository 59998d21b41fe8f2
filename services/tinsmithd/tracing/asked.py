"""Whether a process is asked for spans, and the start of them."""

import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence

from tinsmithd.config import Config, ConfigError
from tinsmithd.tracing import spans

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own: what a cluster has for all programs in it."""
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
NOT_INSTALLED = "OpenTelemetry is not installed: pip install 'tinsmith[otel]'"

_log = logging.getLogger(__name__)


def is_asked(endpoint: str, env: Mapping[str, str]) -> bool:
    """Whether spans are to be made.

    Args:
        endpoint: The setting.
        env: The environment, which may say it, too, and may say that there are to be none.
    """
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if env.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return bool(endpoint) or any(env.get(name) for name in ENDPOINT_VARIABLES)


def start_spans(config: Config) -> None:
    """Make spans from now on, if this process is asked for them.

    Args:
        config: Its settings.

    Raises:
        ConfigError: They ask for it, and it cannot be done.
    """
    endpoint = config.otlp_endpoint
    if spans.on() or not is_asked(endpoint, os.environ):
        return
    protocol = _first(PROTOCOL_VARIABLES)
    if not endpoint and protocol not in ("", "grpc"):
        # That endpoint is another one than a collector has for gRPC.
        _log.warning("no spans: the environment asks for %s, and this speaks grpc", protocol)
        return
    try:
        from tinsmithd.tracing.otlp import OtlpTracer
    except ImportError as error:
        if endpoint:
            raise ConfigError(f"{config.section}.otlp_endpoint: {NOT_INSTALLED}") from error
        _log.warning("%s asks for spans; %s", ENDPOINT_VARIABLES[-1], NOT_INSTALLED)
        return
    try:
        spans.install(OtlpTracer(config.section, endpoint, importlib.metadata.version("tinsmith")))
    except ValueError as error:
        raise ConfigError(f"one of OpenTelemetry's variables is wrong: {error}") from error
    _log.info("spans go to the collector at %s", endpoint or _first(ENDPOINT_VARIABLES))


def _first(names: Sequence[str]) -> str:
    """The first of some variables that is set; empty where none is."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")
