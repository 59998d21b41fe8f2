"""Settings of the Checkpoint server."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from tinsmithd.config.base import ServerConfig
from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import MIB, Address, Count, Number, OptionalAddress


class CheckpointConfig(ServerConfig):
    """The Checkpoint server."""

    section: ClassVar[str] = "checkpoint"

    listen_address: Address = "127.0.0.1:50053"
    """Where to listen; port 0 takes a free one and logs it."""
    cluster_address: OptionalAddress = ""
    """Where the cluster's own servers call this one, and nobody else: each must show a certificate
    that `cluster_tls_ca_file` vouches for. Empty: they call `listen_address`."""
    cluster_names: str = ""
    """Names (DNS, URI such as `spiffe://cluster/training`, or IP address) of which the certificate
    of such a caller must have one, with commas; empty: any does."""
    cluster_port_file: str = ""
    """File to write the port of `cluster_address` into; empty writes none."""
    message_bytes_max: Count = 8 * MIB
    """Largest message received; a piece of a file has up to 4 MiB."""
    data_folder: str = "tinsmith-data/checkpoints"
    """Where checkpoints are kept; this server is its only writer. With `store_url`: where this
    server has what is on its way in, and a view of the catalogue that it can lose."""
    store_url: str = ""
    """An object store that has checkpoints in place of `data_folder`, and the catalogue: such as
    `s3://bucket/prefix`, `gs://bucket/prefix`, `az://account/container/prefix`, or
    `file:///folder`. Several servers may have the same one, each with a `data_folder` of its own.
    Needs `tinsmith[s3]`."""
    store_options_file: str = ""
    """JSON file of names and texts that obstore takes for the store, such as `endpoint`,
    `access_key_id` and `secret_access_key`, read at start; empty: the environment says all, such as
    `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or the machine does."""
    store_ca_file: str = ""
    """Authorities (PEM) that vouch for an object store at `https://`, beside those that the machine
    knows."""
    store_grace_s: Number = Field(3600.0, ge=60)
    """How long a file in the object store must have been in no checkpoint before it is removed;
    whoever reads it goes on for as long. A write must commit within half of it after its last
    byte."""
    store_follow_interval_s: Number = 1.0
    """How often the object store is asked what other servers committed, for those who watch. Who
    asks this server for a checkpoint always hears of the newest."""
    checkpoint_bytes_max: Count = 64 * 1024 * MIB
    """Bytes of one checkpoint, over all of its files."""
    tenant_stored_bytes_max: Count = 0
    """Bytes of one tenant's checkpoints, files that several have in common counted for each; 0: no
    limit. The file of keys may say another one for some tenants."""
    files_max: Count = 64
    """Files of one checkpoint, and names in one request."""
    writer_epoch_step_max: Count = 1_000_000
    """How far a writer's epoch may be above the highest that was seen of it; an epoch is one start
    of a Training server, so this many may come without one save between them."""
    staged_bytes_max: Count = 256 * 1024 * MIB
    """Bytes on disk of checkpoints that are not complete; writes beyond are RESOURCE_EXHAUSTED. One
    peer has at most `peer_share_max` of them, too, which must hold one checkpoint of
    `checkpoint_bytes_max`."""
    rank_max: Count = 256
    """Largest LoRA rank; as `training.rank_max`."""
    sweep_interval_s: Number = 60.0
    """How often expired checkpoints are reclaimed."""
    lease_s: Number = Field(30.0, ge=0.5)
    """How long an ephemeral checkpoint is held for who used it, or said that they hold it. It is
    reclaimed soon after, if its model has a newer one or is gone."""

    @model_validator(mode="after")
    def _who_comes_there_is_known(self) -> Self:
        if self.cluster_address and not self.cluster_tls_certificate_file:
            message = "must be set where cluster_address is"
            raise broken_rule("cluster_tls_certificate_file", message)
        return self

    download_url_ttl_s_max: int = Field(0, ge=0, le=604_800)
    """How long a URL may live by which whoever has it reads a file of a checkpoint out of the
    object store, without this server; 0: none are given. It shows bucket and prefix, and on S3 the
    id of the key, to the checkpoint's owner. Stores take up to 7 days."""

    @model_validator(mode="after")
    def _options_are_of_a_store(self) -> Self:
        if self.store_options_file and not self.store_url:
            raise broken_rule("store_url", "must be set where store_options_file is")
        return self

    @model_validator(mode="after")
    def _a_share_holds_a_checkpoint(self) -> Self:
        if self.staged_bytes_max * self.peer_share_max < self.checkpoint_bytes_max:
            message = "a peer's share of it must hold one checkpoint of checkpoint_bytes_max"
            raise broken_rule("staged_bytes_max", f"{message}, {self.checkpoint_bytes_max} bytes")
        return self
