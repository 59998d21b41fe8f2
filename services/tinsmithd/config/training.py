"""Settings of the Training server."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tinsmithd.config.base import ServerConfig, check_cluster_key, names_in
from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import (
    LINK_ADDRESS,
    MIB,
    AboveZero,
    Address,
    Count,
    Dtype,
    Number,
    OptionalAddress,
    Positive,
    TrainerEngine,
    ZeroStage,
    is_loopback,
    parse_address,
)


class TrainingConfig(ServerConfig):
    """The Training server: order, answers and models; no torch."""

    section: ClassVar[str] = "training"

    listen_address: Address = "127.0.0.1:50051"
    """Where to listen; port 0 takes a free one and logs it."""
    stop_grace_s: Number = 3.0
    """How long SIGTERM lets the calls under way finish. Those that wait are told at once; they and
    what does not finish are made after the next start, where `durability` keeps them."""
    cluster_key_file: str = ""
    """File with the key of scope `server` that this process shows to other servers; needed with
    `keys_file`. It is read again when it changes."""
    sampler_address: str = ":50052"
    """What clients are told: `host:port`, `:port` (this host), a list of those with commas, or
    empty (same address). A name may stand for many Samplers."""
    checkpoint_address: str = ":50053"
    """What clients are told, as `sampler_address`, but only one. Several Checkpoint servers over
    one object store may be behind it: a name with several addresses, or
    `ipv4:10.0.0.1:50053,10.0.0.2:50053`."""
    shard_addresses: str = ""
    """Where clients find the Training servers of a cluster that has several, with commas, the same
    list at each. A tenant's models are at one of them, which its name says. Empty: all are here."""
    shard_address: str = ""
    """This server's own among them; several with commas where they lead to it."""
    gateway_url: str = ""
    """What clients are told of the gateway, such as `https://host/prefix`: they ask it for URLs of
    downloads. Empty: they are told of none."""
    checkpoint_target: str = "127.0.0.1:50053"
    """Where this server itself reaches the Checkpoint server, or several as in
    `checkpoint_address`."""
    checkpoint_folder: str = ""
    """The Checkpoint server's `data_folder`, where this server and rank 0 run on its machine as its
    user: what is saved is left there, and not sent. Empty, or where that is not so: it is sent."""
    checkpoint_answer_s_max: AboveZero = 30.0
    """A call to the Checkpoint server that moves no data is given up after this long, and so is a
    read whose connection broke and that cannot go on."""
    checkpoint_stall_s_max: AboveZero = 60.0
    """A call to the Checkpoint server that moves data is given up when nothing moves for this long;
    a slow one is waited for."""
    staged_bytes_max: Count = 256 * 1024 * MIB
    """Bytes of states on their way to or from the Checkpoint server; they are in data_folder."""
    state_copies_max: Positive = 2
    """States that the ranks hold a copy of at once, until this server has taken it."""
    data_folder: str = "tinsmith-data/training"
    """Where the journal and the snapshots are kept; one server at a time has it."""
    durability: Literal["fsync", "async", "none"] = "fsync"
    """What survives: fsync (a loss of power), async (the death of any process), none."""
    snapshot_steps: Positive = 20
    """A snapshot of a model is taken after this many optimizer steps."""
    snapshot_interval_s: Number = 600.0
    """A snapshot of a model is also taken with the next step after this long."""
    snapshot_idle_s: Number = 30.0
    """A snapshot of a model is also taken when no call of it came for this long."""
    replay_check: Literal["exact", "close"] = "exact"
    """What calls that are made again after a crash must give: exact (the same bits, on ranks of the
    same kind) or close (the same metrics but for rounding). On GPUs that do not give the same bits
    each time, see `[trainer] deterministic`, it is always close."""
    link_address: OptionalAddress = ""
    """Where ranks attach, and nobody else; empty is 127.0.0.1:50054, or a free port of 127.0.0.1
    where this server starts its ranks itself."""
    link_secret_file: str = ""
    """File with the secret that ranks must show, of 32 characters or more; empty makes one,
    `link.secret` in `data_folder`, which is enough on loopback alone."""
    cluster_names: str = ""
    """Names (DNS, URI such as `spiffe://cluster/trainer`, or IP address) of which the certificate
    of a rank must have one, with commas; empty: any does. With `cluster_tls_certificate_file` ranks
    attach with TLS, and must show a certificate that `cluster_tls_ca_file` vouches for."""
    link_port_file: str = ""
    """File to write the port of `link_address` into; empty writes none."""
    rank_lease_s: Number = Field(30.0, ge=1)
    """A rank group that says nothing for this long is replaced."""
    call_attempts_max: Positive = 2
    """Maximum number of rank deaths during one call, of ranks that nobody ended; then the call is
    refused."""
    journal_bytes_max: Count = 16 * 1024 * MIB
    """Bytes of one model's calls since its last snapshot."""
    data_per_call_max: Count = 65_536
    """Data of one call. It bounds what a call costs beside its bytes; `call_bytes_max` bounds
    memory."""
    chunks_max: Count = 1024
    """Chunks of one datum's input."""
    loss_fn_inputs_max: Count = 16
    """Arrays of one datum, whether its loss reads them or not."""
    call_bytes_max: Count = 256 * MIB
    """Bytes of one call's data, over all of its messages."""
    targets_per_position_max: Count = 64
    """Target tokens of one position, where a loss takes several."""
    models_max: Positive = 64
    """Models at the ranks. At the limit the one that was idle longest is suspended: it moves to
    disk, and its next call brings it back. With durability "none" no model can be suspended."""
    models_kept_max: Positive = 1000
    """Models that there are, suspended ones included."""
    suspend_idle_s: Number = 2.0
    """A model whose last call ended within this long is not suspended for another one, unless
    `suspend_busy_s` says so."""
    suspend_busy_s: Number = 30.0
    """A model that has been at the ranks for this long may be suspended between two calls, however
    busy it is."""
    rank_max: Count = 256
    """Largest LoRA rank of a model."""
    lane_calls_max: Count = 256
    """Calls of one model that wait; more are RESOURCE_EXHAUSTED."""
    lane_bytes_max: Count = 1024 * MIB
    """Bytes of one model's calls that wait; more are RESOURCE_EXHAUSTED."""
    gap_wait_s_max: Number = 60.0
    """How long a call waits for calls with lower `seq_id`s that have not arrived."""
    answers_kept_max: Count = 256
    """Answers of one model that are kept for repeats; the oldest are dropped."""
    answer_bytes_kept_max: Count = 256 * MIB
    """Bytes of one model's answers that are kept for repeats; the oldest are dropped."""
    steps_kept_max: Positive = 10_000
    """Optimizer steps of one model that are remembered, with their metrics; the oldest are
    dropped."""
    ephemeral_ttl_s: Count = 86_400
    """The newest ephemeral sampler weights of a model are deleted after this long without use."""
    model_idle_ttl_s: Number = 7 * 86_400.0
    """A model without a call for this long is deleted; its checkpoints stay."""
    tenant_models_max: Count = 0
    """Models of one tenant; 0: no limit but `models_kept_max`. The file of keys may say another one
    for some tenants, as of all settings that begin with `tenant_`."""
    tenant_queued_bytes_max: Count = 0
    """Bytes of one tenant's calls that wait, of all its models; 0: no limit."""
    tenant_tokens_per_minute_max: Count = 0
    """Tokens that one tenant may have computed in a minute, here; 0: no limit."""
    quantum_tokens: Positive = 16384
    """A larger call is computed in batches of this many tokens; others have turns in between.
    Several ranks have a batch of so many for each of them, or of four times its longest datum."""
    peak_flops: Number = 0.0
    """Operations that one rank can make in a second, for the share of it that is used (MFU) in
    metrics; 0: what is known of its GPU, with bfloat16 weights, else none is said."""
    spawn_ranks: Count = 0
    """Start this many ranks on this machine; 0 waits for a rank group to attach."""
    spawn_spare_groups: Count = 0
    """Start this many more rank groups, which stand by with the base model loaded."""
    spawn_base_model: str = ""
    """Base model of spawned ranks: a Hugging Face name or a folder."""
    spawn_dtype: Dtype = "float32"
    """`trainer.dtype` of spawned ranks."""
    spawn_engine: TrainerEngine = "deepspeed"
    """`trainer.engine` of spawned ranks."""
    spawn_zero_stage: ZeroStage = 1
    """`trainer.zero_stage` of spawned ranks."""
    spawn_threads: Count = 0
    """`trainer.threads` of spawned ranks."""

    def warnings(self) -> list[str]:
        """Say what goes over a network that others may reach."""
        said = super().warnings() + self._plain_calls(self.checkpoint_target)
        if not is_loopback(self.link_bind_address) and not self.cluster_tls_certificate_file:
            secure = "set cluster_tls_certificate_file, or keep the network private"
            said.append(f"ranks attach at {self.link_bind_address} in plain text: {secure}")
        return said

    @property
    def call_received_bytes_max(self) -> int:
        """See `ServerConfig`."""
        return max(self.message_bytes_max, self.call_bytes_max)

    @property
    def link_bind_address(self) -> str:
        """`link_address`, or what it is where it is empty."""
        return self.link_address or ("127.0.0.1:0" if self.spawn_ranks else LINK_ADDRESS)

    @model_validator(mode="after")
    def _an_open_link_has_a_secret(self) -> Self:
        if not is_loopback(self.link_bind_address) and not self.link_secret_file:
            message = "must be set where other machines reach link_address"
            raise broken_rule("link_secret_file", message)
        return self

    @property
    def shards(self) -> tuple[str, ...]:
        """Each of `shard_addresses`."""
        return names_in(self.shard_addresses)

    @property
    def own_shards(self) -> tuple[str, ...]:
        """Each of `shard_address`."""
        return names_in(self.shard_address)

    @model_validator(mode="after")
    def _shards_are_addresses(self) -> Self:
        for address in self.shards:
            try:
                _, port = parse_address(address.removeprefix("https://"))
            except ValueError:
                port = 0
            if not port or any(character.isspace() for character in address):
                message = f"must be host:port, with commas between them, not {address[:100]!r}"
                raise broken_rule("shard_addresses", message)
        if len(set(self.shards)) < len(self.shards):
            raise broken_rule("shard_addresses", "must name each address once")
        return self

    @model_validator(mode="after")
    def _a_shard_is_one_of_them(self) -> Self:
        own, others = set(self.own_shards), set(self.shards)
        if bool(own) != bool(others) or not own <= others:
            raise broken_rule("shard_address", "must be one of shard_addresses, or some of them")
        return self

    @model_validator(mode="after")
    def _spawned_ranks_have_a_base_model(self) -> Self:
        if self.spawn_ranks and not self.spawn_base_model:
            raise broken_rule("spawn_base_model", "must be set where spawn_ranks is")
        return self

    @model_validator(mode="after")
    def _a_server_has_a_key(self) -> Self:
        check_cluster_key(self.keys_file, self.cluster_key_file)
        return self
