"""Settings that every process has, and those that every gRPC server has."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tinsmithd.config import sources
from tinsmithd.config.errors import BROKEN_RULE, Report
from tinsmithd.config.fields import (
    MIB,
    AboveZero,
    Address,
    Count,
    Number,
    OptionalAddress,
    Positive,
    is_loopback,
)


class Config(BaseSettings):
    """What every process has; subclasses add their own settings.

    A Config is never wrong: one that is built in code is checked as one that is loaded, and takes
    nothing from the environment.

    Raises:
        ConfigError: A key is unknown or a value impossible.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    section: ClassVar[str] = ""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe messages that are logged."""
    live_with_pid: Count = 0
    """End when this process ends, so that nothing outlives who started it; 0 is for pods."""

    def __init__(self, *, _given: Mapping[str, sources.Given] | None = None, **values: Any) -> None:
        given = _given or {}
        values.update({key: each.value for key, each in given.items()})
        try:
            super().__init__(**values)
        except ValidationError as error:
            origins = {key: each.origin() for key, each in given.items()}
            raise Report(self.section, type(self).model_fields, origins).of(error) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take nothing but the arguments: `load` has the other sources."""
        return (init_settings,)

    @classmethod
    def given(
        cls, argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None
    ) -> dict[str, sources.Given]:
        """What file, environment and command line give, not checked yet; see `load`."""
        return sources.read(cls, cls.section, argv, os.environ if env is None else env)

    @classmethod
    def load(cls, argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings of this process.

        Args:
            argv: Command line without the program name; None means `sys.argv[1:]`.
            env: Environment; None means `os.environ`.

        Raises:
            ConfigError: A key is unknown or a value impossible.
        """
        return cls(_given=cls.given(argv, env))

    def warnings(self) -> list[str]:
        """What a person should hear of these settings when the process starts."""
        return []


def broken_rule(key: str, message: str) -> PydanticCustomError:
    """What a rule over several settings raises.

    Args:
        key: The setting that somebody should change.
        message: What it must be.
    """
    return PydanticCustomError(BROKEN_RULE, "{message}", {"key": key, "message": message})


class ServerConfig(Config):
    """What every gRPC server has."""

    listen_address: Address = "127.0.0.1:0"
    """Where to listen; port 0 takes a free one and logs it."""
    message_bytes_max: Count = 32 * MIB
    """Largest message received."""
    message_items_max: Positive = 262_144
    """Most items of one message: each field that is set, at every level, each plain number, and
    each four bytes of text. It is read in some tens of milliseconds at most, whatever it holds."""
    concurrent_calls_max: Positive = 1024
    """Calls under way at once, waiting ones included; more are RESOURCE_EXHAUSTED. Health's `Check`
    is not counted."""
    received_bytes_max: Count = 1024 * MIB
    """Bytes of requests that were received and that nothing else accounts for yet: of calls that
    are not complete, above all. A call that would have more is RESOURCE_EXHAUSTED. One peer's share
    of it must hold a call of the largest size."""
    peer_share_max: AboveZero = Field(0.5, le=1)
    """Share of `concurrent_calls_max`, `received_bytes_max` and the like that one peer may have. A
    peer is a host: where all callers come through one proxy they are one, and this is 1."""
    stream_stall_s: AboveZero = 60.0
    """A peer that sends nothing of a call that is not complete, or reads nothing of an answer, for
    this long has its stream ended; waiting for a turn is no stall."""
    handshake_s_max: AboveZero = 10.0
    """A connection that does not speak HTTP/2 by then is closed."""
    connection_idle_s_max: Number = 300.0
    """A connection without calls is closed after this long; a client opens it again by itself."""
    connections_max: Count = 0
    """Connections at once, more are closed at once; 0 leaves a quarter of the descriptors that the
    process may open, and at most 1,024, to its own files."""
    stop_grace_s: Number = 20.0
    """How long SIGTERM lets calls finish."""
    port_file: str = ""
    """File to write the port into once it is bound; empty writes none."""
    metrics_address: OptionalAddress = ""
    """Where Prometheus reads `/metrics`; empty serves and counts none."""

    @property
    def call_received_bytes_max(self) -> int:
        """Bytes that one call may have to send before anything else accounts for them."""
        return self.message_bytes_max

    def warnings(self) -> list[str]:
        """Say which addresses are reachable from other machines."""
        return warnings_of(self.listen_address, self.metrics_address)

    @model_validator(mode="after")
    def _a_share_holds_a_call(self) -> Self:
        call_bytes = self.call_received_bytes_max
        if self.received_bytes_max * self.peer_share_max < call_bytes:
            message = f"a peer's share of it must hold one call of {call_bytes} bytes"
            raise broken_rule("received_bytes_max", message)
        return self


def warnings_of(*addresses: str) -> list[str]:
    """Say which addresses, if they are not empty, are reachable from other machines."""
    return [
        f"listening on {each} without keys or TLS: keep the network private"
        for each in addresses
        if each and not is_loopback(each)
    ]
