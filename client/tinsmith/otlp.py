"""Spans on their way from this process to a collector; imported where somebody asks for them.

They wait in a bounded queue, which a thread of OpenTelemetry's empties: whoever makes a span never
waits, and a span for which there is no room is dropped.
"""

import logging
import os
import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

_EXPORTER = "opentelemetry.exporter.otlp.proto.grpc.exporter"


class Exporting:
    """Makes spans and sends them over OTLP. OpenTelemetry's own variables hold for all of it.

    Args:
        service: What this process is called, unless `OTEL_SERVICE_NAME` says it.
        endpoint: Where the collector is, `http://host:port` or `https://host:port`; empty leaves it
            to the variables.
        about: What else is said of this process.

    Attributes:
        provider: Makes tracers.

    Raises:
        ValueError: One of those variables is wrong.
    """

    def __init__(self, service: str, endpoint: str, about: Mapping[str, str]) -> None:
        # A collector that is away is worth a line now and then, not one for each try.
        logging.getLogger(_EXPORTER).setLevel(logging.ERROR)
        attributes = dict(about)
        if not os.environ.get(OTEL_SERVICE_NAME):
            attributes[SERVICE_NAME] = service
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None))
        resource = Resource.create(dict(attributes))
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(self._processor)

    def stop(self, within_s: float) -> None:
        """Send what there is, as far as that can be done in time."""
        # OpenTelemetry itself waits for half a minute where nobody takes it.
        ending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(within_s)
