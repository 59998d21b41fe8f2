"""Settings that every process has, and those that every gRPC server has."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from tinsmithd.config import sources
from tinsmithd.config.errors import Report, broken_rule
from tinsmithd.config.fields import (
    MIB,
    AboveZero,
    Address,
    Count,
    Endpoint,
    LogFormat,
    Number,
    OptionalAddress,
    Positive,
    is_loopback,
    leaves_this_machine,
)
from tinsmithd.config.oidc import OidcSettings
from tinsmithd.owners import OWNER_PATTERN
from tinsmithd.tenants import TENANTS_NAMED_MAX


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
    log_format: LogFormat = "text"
    """How they are written: as text, or each as one line of JSON."""
    otlp_endpoint: Endpoint = ""
    """Collector that takes spans (OTLP over gRPC); needs `tinsmith[otel]`. Empty: the one that
    `OTEL_EXPORTER_OTLP_ENDPOINT` names; without that there are no spans."""
    live_with_pid: Count = 0
    """End when this process ends, so that nothing outlives who started it; 0 is for pods."""
    cluster_tls_certificate_file: str = ""
    """Certificate (PEM, with those between it and its authority) by which the cluster's other
    processes know this one; it must be good for servers and for clients. Empty: it has none. A file
    that is replaced is read again, as are all that follow, and those of `tls_...`."""
    cluster_tls_key_file: str = ""
    """The key of that certificate (PEM, no passphrase)."""
    cluster_tls_ca_file: str = ""
    """Authorities (PEM) that vouch for the cluster's processes: whom this one calls, and who calls
    it where only they may. Set: it calls the others with TLS; empty: in plain text."""

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

    def _plain_calls(self, *targets: str) -> list[str]:
        """Say which of the other servers are called in plain text, over a network."""
        if self.cluster_tls_ca_file:
            return []
        return [
            f"calling {each} in plain text: set cluster_tls_ca_file, or keep the network private"
            for each in targets
            if leaves_this_machine(each)
        ]

    @model_validator(mode="after")
    def _a_certificate_is_whole(self) -> Self:
        check_pair(self, "cluster_tls_certificate_file", "cluster_tls_key_file")
        if self.cluster_tls_certificate_file and not self.cluster_tls_ca_file:
            raise broken_rule(
                "cluster_tls_ca_file", "must be set where cluster_tls_certificate_file is"
            )
        return self


def names_in(text: str) -> tuple[str, ...]:
    """The names in a text that has some with commas."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def check_pair(config: Config, certificate: str, key: str) -> None:
    """Refuse a certificate without its key, and the other way.

    Args:
        config: Has both.
        certificate: The setting that names its file.
        key: Likewise.
    """
    for one, other in ((certificate, key), (key, certificate)):
        if getattr(config, one) and not getattr(config, other):
            raise broken_rule(other, f"must be set where {one} is")


class CalledConfig(OidcSettings, Config):
    """What every process has that others call: the gRPC servers and the gateway."""

    keys_file: str = ""
    """File of the keys that callers must show, which `tinsmith keys` makes; the same for all
    servers of a cluster. Who is revoked there is refused within a second. Empty: there are none,
    and whoever reaches a port owns everything; that is refused where other machines reach it."""
    insecure: CliImplicitFlag[bool] = False
    """Let other machines reach `listen_address` though there are no keys."""
    log_calls: CliImplicitFlag[bool] = False
    """Log a line for each call when it ends: its method, status, time, bytes and tenant."""
    tls_certificate_file: str = ""
    """Certificate (PEM, with those between it and its authority) that is shown to callers: who
    speaks no TLS is refused then, at `metrics_address` too. Empty: plain text."""
    tls_key_file: str = ""
    """The key of that certificate (PEM, no passphrase)."""
    tls_client_ca_file: str = ""
    """Authorities (PEM): callers must show a certificate that one of them vouches for. Empty: they
    need none. Not at `metrics_address`."""
    metrics_tenants: str = ""
    """Tenants, with commas, that metrics name: each has series of its own, and all others share
    one, `(other)`. Whoever reads metrics then sees who is here. Empty, and
    `metrics_tenants_max` 0: metrics tell no tenants apart."""
    metrics_tenants_max: Count = Field(0, le=TENANTS_NAMED_MAX)
    """Further tenants that metrics name: those that call first after a start."""

    @property
    def metrics_tenant_names(self) -> tuple[str, ...]:
        """The names in `metrics_tenants`."""
        return names_in(self.metrics_tenants)

    @model_validator(mode="after")
    def _tenants_have_names(self) -> Self:
        names = names_in(self.metrics_tenants)
        if len(names) > TENANTS_NAMED_MAX:
            message = f"must name at most {TENANTS_NAMED_MAX} tenants"
            raise broken_rule("metrics_tenants", message)
        for name in names:
            if not OWNER_PATTERN.fullmatch(name):
                message = "must be names of tenants: letters, digits, '.', '_' and '-'"
                raise broken_rule("metrics_tenants", message)
        return self

    def _reachable(self, listen_address: str, metrics_address: str) -> list[str]:
        """Say which addresses, if they are not empty, are reachable from other machines."""
        said = []
        for address, keys in ((listen_address, self.keys_file), (metrics_address, "")):
            there = {"keys": keys, "TLS": self.tls_certificate_file}
            lacking = " or ".join(what for what, is_there in there.items() if not is_there)
            if lacking and address and not is_loopback(address):
                said.append(f"listening on {address} without {lacking}: keep the network private")
        return said

    @model_validator(mode="after")
    def _what_callers_see_is_whole(self) -> Self:
        check_pair(self, "tls_certificate_file", "tls_key_file")
        if self.tls_client_ca_file and not self.tls_certificate_file:
            message = "must be set where tls_client_ca_file is"
            raise broken_rule("tls_certificate_file", message)
        return self


class ServerConfig(CalledConfig):
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
        return self._reachable(self.listen_address, self.metrics_address)

    @model_validator(mode="after")
    def _an_open_address_has_keys(self) -> Self:
        check_keys(self.listen_address, self.keys_file, insecure=self.insecure)
        return self

    @model_validator(mode="after")
    def _a_share_holds_a_call(self) -> Self:
        call_bytes = self.call_received_bytes_max
        if self.received_bytes_max * self.peer_share_max < call_bytes:
            message = f"a peer's share of it must hold one call of {call_bytes} bytes"
            raise broken_rule("received_bytes_max", message)
        return self


def check_keys(listen_address: str, keys_file: str, *, insecure: bool) -> None:
    """Refuse an address that other machines reach, where nobody needs a key.

    Raises:
        PydanticCustomError: That is so, and `insecure` does not say that it is meant.
    """
    if not (keys_file or insecure or is_loopback(listen_address)):
        message = (
            "must be set where other machines reach listen_address: without keys whoever reaches "
            "it owns everything; insecure = true says that it is meant"
        )
        raise broken_rule("keys_file", message)


def check_cluster_key(keys_file: str, cluster_key_file: str) -> None:
    """Refuse a process that other servers would refuse.

    Raises:
        PydanticCustomError: There are keys, and it has none to show.
    """
    if keys_file and not cluster_key_file:
        message = "must be set with keys_file; `tinsmith keys create --scope server` makes one"
        raise broken_rule("cluster_key_file", message)
