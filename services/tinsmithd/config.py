"""Settings of the four kinds of process: a frozen dataclass each, checked before anything starts.

A setting comes from, later ones winning: the default here, a TOML file with one section per
process (`[training]`, `[trainer]`, `[sampler]`, `[checkpoint]`), the environment
(`TINSMITH_TRAINING_LISTEN_ADDRESS`), the command line (`--listen-address`). A key that no
dataclass knows stops the process: a typo must not run with a default.
"""

import argparse
import dataclasses
import ipaddress
import logging
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

MIB = 1024 * 1024
LINK_ADDRESS = "127.0.0.1:50054"
"""Where ranks attach if nothing else is said."""
_log = logging.getLogger(__name__)


class ConfigError(Exception):
    """A setting is unknown or impossible; the message names the key and what is allowed."""


@dataclass(frozen=True)
class Config:
    """What every process has; subclasses add their own settings."""

    section: ClassVar[str] = ""

    log_level: str = "INFO"
    """One of DEBUG, INFO, WARNING, ERROR."""
    live_with_pid: int = 0
    """End when this process ends, so that nothing outlives who started it; 0 is for pods."""

    def check(self) -> None:
        """Raise ConfigError for the first setting that is out of range."""
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"{self.section}.log_level: expected DEBUG, INFO, WARNING or ERROR")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise ConfigError(f"{self.section}.{name}: {value} is below 0")

    @classmethod
    def load(cls, argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> Self:
        """Read the settings of this process.

        Args:
            argv: Command line without the program name; None means `sys.argv[1:]`.
            env: Environment; None means `os.environ`.

        Raises:
            ConfigError: A key is unknown or a value impossible.
        """
        env = os.environ if env is None else env
        parser = argparse.ArgumentParser(
            prog=f"python -m tinsmithd.{cls.section}",
            description=cls.__doc__,
            allow_abbrev=False,  # a part of a key is a typo, too
        )
        parser.add_argument("--config", metavar="FILE", help="TOML file")
        kinds = typing.get_type_hints(cls)
        keys = [f.name for f in dataclasses.fields(cls)]
        for key in keys:
            parser.add_argument(
                f"--{key.replace('_', '-')}", metavar=key.rpartition("_")[2].upper()
            )
        args = vars(parser.parse_args(argv))
        prefix = f"TINSMITH_{cls.section.upper()}_"
        file = args["config"] or env.get("TINSMITH_CONFIG")
        values: dict[str, Any] = {}
        if file:
            values.update(_read_section(Path(file), cls.section, keys))
        for variable in env:
            if variable.startswith(prefix):
                key = variable.removeprefix(prefix).lower()
                if key not in keys:
                    raise ConfigError(f"{variable}: unknown key; known are {', '.join(keys)}")
                values[key] = env[variable]
        values.update({key: args[key] for key in keys if args[key] is not None})
        config = cls(**{k: _typed(f"{cls.section}.{k}", v, kinds[k]) for k, v in values.items()})
        config.check()
        return config


def _read_section(file: Path, section: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    for name in document:
        if name not in SECTIONS:
            raise ConfigError(f"{file}: unknown section [{name}]; known are {', '.join(SECTIONS)}")
    values: dict[str, Any] = document.get(section, {})
    for key in values:
        if key not in keys:
            raise ConfigError(f"{file}: unknown key {section}.{key}; known are {', '.join(keys)}")
    return values


def _typed(key: str, value: Any, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if kind in (int, float, str):
            return kind(value)
    except (KeyError, ValueError):
        raise ConfigError(f"{key}: {value!r} is not a {kind.__name__}") from None
    raise ConfigError(f"{key}: settings of type {kind} are not supported")


@dataclass(frozen=True)
class ServerConfig(Config):
    """What every gRPC server has."""

    listen_address: str = "127.0.0.1:0"
    """host:port to bind; port 0 takes a free one and logs it."""
    message_bytes_max: int = 32 * MIB
    """Largest message received."""
    message_items_max: int = 262_144
    """Most items of one message: each field that is set, at every level, each plain number, and
    each four bytes of text. It is read in some tens of milliseconds at most, whatever it holds."""
    concurrent_calls_max: int = 1024
    """Calls under way at once, waiting ones included; more are RESOURCE_EXHAUSTED. Health's `Check`
    is not counted."""
    received_bytes_max: int = 1024 * MIB
    """Bytes of requests that were received and that nothing else accounts for yet: of calls that
    are not complete, above all. A call that would have more is RESOURCE_EXHAUSTED."""
    peer_share_max: float = 0.5
    """Share of `concurrent_calls_max`, `received_bytes_max` and the like that one peer may have. A
    peer is a host: where all callers come through one proxy they are one, and this is 1."""
    stream_stall_s: float = 60.0
    """A peer that sends nothing of a call that is not complete, or reads nothing of an answer, for
    so long has its stream ended; waiting for a turn is no stall."""
    handshake_s_max: float = 10.0
    """A connection that does not speak HTTP/2 by then is closed."""
    connection_idle_s_max: float = 300.0
    """A connection without calls is closed after so long; a client opens it again by itself."""
    connections_max: int = 0
    """Connections at once, more are closed at once; 0 leaves a quarter of the descriptors that the
    process may open, and at most 1,024, to its own files."""
    stop_grace_s: float = 20.0
    """How long SIGTERM lets calls finish."""
    port_file: str = ""
    """File to write the port into once it is bound; empty writes none."""
    metrics_address: str = ""
    """host:port where Prometheus reads `/metrics`; empty serves and counts none."""

    @property
    def call_received_bytes_max(self) -> int:
        """Bytes that one call may have to send before anything else accounts for them."""
        return self.message_bytes_max

    def check(self) -> None:
        """Also warn when an address is reachable from other machines."""
        super().check()
        if not self.message_items_max:
            raise ConfigError(f"{self.section}.message_items_max: must be at least 1")
        for key in ("concurrent_calls_max", "stream_stall_s", "handshake_s_max"):
            if not getattr(self, key):
                raise ConfigError(f"{self.section}.{key}: must be above 0")
        if not 0 < self.peer_share_max <= 1:
            raise ConfigError(f"{self.section}.peer_share_max: must be above 0 and at most 1")
        if self.received_bytes_max * self.peer_share_max < self.call_received_bytes_max:
            raise ConfigError(
                f"{self.section}.received_bytes_max: a peer's share of it must hold one call of "
                f"{self.call_received_bytes_max} bytes"
            )
        _check_address(f"{self.section}.listen_address", self.listen_address)
        if self.metrics_address:
            _check_address(f"{self.section}.metrics_address", self.metrics_address)


def _check_address(key: str, address: str) -> None:
    if not _is_loopback(key, address):
        _log.warning("listening on %s without keys or TLS: keep the network private", address)


def _is_loopback(key: str, address: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        ConfigError: It is none.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{key}: expected host:port")
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class TrainingConfig(ServerConfig):
    """The Training server: order, answers and models; no torch."""

    section: ClassVar[str] = "training"

    listen_address: str = "127.0.0.1:50051"
    sampler_address: str = ":50052"
    """What clients are told: `host:port`, `:port` (this host), or empty (same address)."""
    checkpoint_address: str = ":50053"
    """What clients are told, as `sampler_address`."""
    checkpoint_target: str = "127.0.0.1:50053"
    """Where this server itself reaches the Checkpoint server."""
    checkpoint_answer_s_max: float = 30.0
    """A call to the Checkpoint server that moves no data is given up after so long."""
    checkpoint_stall_s_max: float = 60.0
    """One that moves data is given up when nothing moves for so long; a slow one is waited for."""
    staged_bytes_max: int = 256 * 1024 * MIB
    """Bytes of states on their way to or from the Checkpoint server; they are in data_folder."""
    state_copies_max: int = 2
    """States that the ranks hold a copy of at once, until this server has taken it."""
    data_folder: str = "tinsmith-data/training"
    """Where the journal and the snapshots are kept; one server at a time has it."""
    durability: str = "fsync"
    """What survives: fsync (a loss of power), async (the death of any process), none."""
    snapshot_steps: int = 20
    """A snapshot of a model is taken after so many optimizer steps."""
    snapshot_interval_s: float = 600.0
    """Or with the next step after so long."""
    replay_check: str = "exact"
    """What calls that are made again after a crash must give: exact (the same bits, on ranks of the
    same kind) or close (the same metrics but for rounding). On GPUs it is always close."""
    link_address: str = ""
    """host:port where ranks attach, and nobody else; empty is 127.0.0.1:50054, or a free port of
    127.0.0.1 where this server starts its ranks itself."""
    link_secret_file: str = ""
    """File with the secret that ranks must show, of 32 characters or more; empty makes one,
    `link.secret` in `data_folder`, which is enough on loopback alone."""
    link_port_file: str = ""
    """File to write the port of `link_address` into; empty writes none."""
    rank_lease_s: float = 30.0
    """A rank group that says nothing for so long is replaced."""
    call_attempts_max: int = 2
    """A call during which the ranks died so often by themselves is refused."""
    journal_bytes_max: int = 16 * 1024 * MIB
    """Bytes of one model's calls since its last snapshot."""
    data_per_call_max: int = 65_536
    """Bounds what a call costs beside its bytes; memory is bounded by `call_bytes_max`."""
    chunks_max: int = 1024
    """Chunks of one datum's input."""
    loss_fn_inputs_max: int = 16
    """Arrays of one datum, whether its loss reads them or not."""
    call_bytes_max: int = 256 * MIB
    targets_per_position_max: int = 64
    models_max: int = 64
    """Models at the ranks. At the limit the one that was idle longest is suspended: it moves to
    disk, and its next call brings it back. With durability "none" no model can be suspended."""
    models_kept_max: int = 1000
    """Models that there are, suspended ones included."""
    suspend_idle_s: float = 2.0
    """A model whose last call ended within so long is not suspended for another one,"""
    suspend_busy_s: float = 30.0
    """unless it has been at the ranks for so long: then it leaves them between two calls."""
    rank_max: int = 256
    lane_calls_max: int = 256
    lane_bytes_max: int = 1024 * MIB
    gap_wait_s_max: float = 60.0
    answers_kept_max: int = 256
    answer_bytes_kept_max: int = 256 * MIB
    ephemeral_ttl_s: int = 86_400
    """How long sampler weights that were saved without a name, the newest of their model, may be
    unused before they are deleted."""
    model_idle_ttl_s: float = 7 * 86_400.0
    """A model that no call used for so long is deleted; its checkpoints stay."""
    quantum_tokens: int = 16384
    """A larger call is computed in parts of so many tokens; other models have turns in between."""
    spawn_ranks: int = 0
    """Start this many ranks on this machine; 0 waits for a rank group to attach."""
    spawn_spare_groups: int = 0
    """Start so many more rank groups, which stand by with the base model loaded."""
    spawn_base_model: str = ""
    """Base model for spawned ranks."""
    spawn_dtype: str = "float32"
    spawn_engine: str = "deepspeed"
    spawn_zero_stage: int = 1
    spawn_threads: int = 0

    @property
    def call_received_bytes_max(self) -> int:
        """See `ServerConfig`."""
        return max(self.message_bytes_max, self.call_bytes_max)

    def check(self) -> None:
        """Also: spawned ranks need a base model, parts need a size, the rank link a secret."""
        super().check()
        private = _is_loopback("training.link_address", self.link_bind_address)
        if not private and not self.link_secret_file:
            message = "must be set where other machines reach link_address"
            raise ConfigError(f"training.link_secret_file: {message}")
        if self.spawn_ranks and not self.spawn_base_model:
            raise ConfigError("training.spawn_base_model: needed with spawn_ranks")
        _one_of("training.replay_check", self.replay_check, ("exact", "close"))
        _one_of("training.durability", self.durability, ("fsync", "async", "none"))
        counts = ("quantum_tokens", "snapshot_steps", "call_attempts_max", "state_copies_max")
        for key in (*counts, "models_max", "models_kept_max"):
            if not getattr(self, key):
                raise ConfigError(f"training.{key}: must be at least 1")
        _check_patience(self)
        if self.rank_lease_s < 1:
            raise ConfigError("training.rank_lease_s: must be at least 1")

    @property
    def link_bind_address(self) -> str:
        """`link_address`, or what it is where it is empty."""
        return self.link_address or ("127.0.0.1:0" if self.spawn_ranks else LINK_ADDRESS)


@dataclass(frozen=True)
class TrainerConfig(Config):
    """One rank of a rank group, or with `ranks` the group: as many as there are devices."""

    section: ClassVar[str] = "trainer"

    training_target: str = LINK_ADDRESS
    """Where rank 0 attaches: `link_address` of the Training server."""
    link_secret_file: str = ""
    """File with the secret that the Training server demands; rank 0 alone needs it."""
    launch_token: str = ""
    """Given out by a Training server that starts its ranks, which knows them by it."""
    ranks: int = 1
    """Ranks of the group, all on this machine; where torchrun starts them, it says how many."""
    base_model: str = ""
    """Hugging Face name or folder."""
    dtype: str = "float32"
    """Element type of the frozen weights: float32 or bfloat16."""
    engine: str = "deepspeed"
    """deepspeed, or reference: the plain single-process one."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 and 2 optimizer states, 3 the base too is partitioned."""
    offload: bool = False
    """Keep optimizer states and, with stage 3, the base in host memory."""
    gathered_bytes_max: int = 0
    """Stage 3: bytes of the base that a rank keeps whole once they were gathered."""
    micro_batch_tokens_max: int = 2048
    """Tokens that a rank computes together; a longer datum goes alone."""
    activation_bytes_max: int = 0
    """What a rank keeps for the way back before it recomputes; 0 is half of what is free."""
    resident_models_max: int = 16
    """Models on the device at once; the others wait in host memory."""
    threads: int = 0
    """CPU threads per rank; 0 leaves it to torch."""
    collective_timeout_s: float = 30.0
    """A rank that shows no life for so long ends the group; to compute for long is no silence."""

    def check(self) -> None:
        """Also: names and ranges."""
        super().check()
        if not self.base_model:
            raise ConfigError("trainer.base_model: must be set")
        if self.collective_timeout_s < 1:
            raise ConfigError("trainer.collective_timeout_s: must be at least 1")
        _one_of("trainer.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("trainer.engine", self.engine, ("deepspeed", "reference"))
        _one_of("trainer.zero_stage", self.zero_stage, (0, 1, 2, 3))
        for key in ("ranks", "micro_batch_tokens_max", "resident_models_max"):
            if not getattr(self, key):
                raise ConfigError(f"trainer.{key}: must be at least 1")


@dataclass(frozen=True)
class SamplerConfig(ServerConfig):
    """A Sampler server."""

    section: ClassVar[str] = "sampler"

    listen_address: str = "127.0.0.1:50052"
    message_bytes_max: int = 8 * MIB
    """A prompt of a million tokens."""
    base_model: str = ""
    """Hugging Face name or folder."""
    dtype: str = "float32"
    """Element type of the frozen weights: float32 or bfloat16."""
    checkpoint_target: str = "127.0.0.1:50053"
    checkpoint_answer_s_max: float = 30.0
    """As the Training server's."""
    checkpoint_stall_s_max: float = 60.0
    """As the Training server's."""
    checkpoint_recheck_s: float = 10.0
    """Whether a checkpoint that is served from memory is still there is asked so often."""
    num_samples_max: int = 256
    chunks_max: int = 1024
    """Chunks of one prompt."""
    stops_max: int = 64
    stop_characters_max: int = 1024
    """Characters of one stop string."""
    topk_max: int = 64
    running_max: int = 8
    waiting_max: int = 256
    adapters_max: int = 16
    rank_max: int = 256
    """Largest LoRA rank that is served; as `training.rank_max`."""
    adapter_bytes_max: int = 8 * 1024 * MIB
    """Largest checkpoint that is fetched."""
    fetches_max: int = 16
    """Adapters that are fetched at once, or wait in memory for their turn to be loaded."""
    sample_tokens_max: int = 131_072
    """num_samples times prompt and max_tokens: bounds the KV cache of a call."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""

    def check(self) -> None:
        """Also: names and ranges."""
        super().check()
        if not self.base_model:
            raise ConfigError("sampler.base_model: must be set")
        _check_patience(self)
        if not self.fetches_max:
            raise ConfigError("sampler.fetches_max: must be at least 1")
        if self.adapters_max < self.running_max:
            raise ConfigError("sampler.adapters_max: must be at least running_max")
        _one_of("sampler.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class CheckpointConfig(ServerConfig):
    """The Checkpoint server."""

    section: ClassVar[str] = "checkpoint"

    listen_address: str = "127.0.0.1:50053"
    message_bytes_max: int = 8 * MIB
    """A piece has up to 4 MiB."""
    data_folder: str = "tinsmith-data/checkpoints"
    """Where checkpoints are kept; this server is its only writer."""
    checkpoint_bytes_max: int = 64 * 1024 * MIB
    files_max: int = 64
    """Files of one checkpoint, and names in one request."""
    writer_epoch_step_max: int = 1_000_000
    """How far a writer's epoch may be above the highest that was seen of it; an epoch is one start
    of a Training server, so this many may come without one save between them."""
    staged_bytes_max: int = 256 * 1024 * MIB
    """Bytes on disk of checkpoints that are not complete; writes beyond are RESOURCE_EXHAUSTED. One
    peer has at most `peer_share_max` of them, too."""
    rank_max: int = 256
    """Largest LoRA rank; as `training.rank_max`."""
    sweep_interval_s: float = 60.0
    """How often expired checkpoints are reclaimed."""
    lease_s: float = 30.0
    """How long an ephemeral checkpoint is held for who used it, or said that they hold it. It is
    reclaimed soon after, if its model has a newer one or is gone."""

    def check(self) -> None:
        """Also: a lease lasts long enough to be renewed, and one checkpoint can be staged."""
        super().check()
        if self.lease_s < 0.5:
            raise ConfigError("checkpoint.lease_s: must be at least 0.5")
        if self.staged_bytes_max * self.peer_share_max < self.checkpoint_bytes_max:
            message = "a peer's share of it must hold one checkpoint of checkpoint_bytes_max"
            raise ConfigError(f"checkpoint.staged_bytes_max: {message}")


SECTIONS: Mapping[str, type[Config]] = {
    cls.section: cls for cls in (TrainingConfig, TrainerConfig, SamplerConfig, CheckpointConfig)
}


def _check_patience(config: "TrainingConfig | SamplerConfig") -> None:
    for key in ("checkpoint_answer_s_max", "checkpoint_stall_s_max"):
        if not getattr(config, key):
            raise ConfigError(f"{config.section}.{key}: must be above 0")


def _one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}")
