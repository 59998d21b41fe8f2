"""Settings of the gateway."""

from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from tinsmithd.config.base import CalledConfig, check_cluster_key, check_keys
from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import (
    MIB,
    AboveZero,
    Address,
    Count,
    Names,
    Number,
    OptionalAddress,
    Positive,
)

SIGNING_KEY_CHARACTERS_MIN = 32


class GatewaySettings(CalledConfig):
    """The gateway: HTTP for stock Tinker SDKs and OpenAI clients. It holds nothing that a restart
    may lose, and any number of them may stand behind one address."""

    section: ClassVar[str] = "gateway"

    listen_address: Address = "127.0.0.1:8080"
    """Where to listen; port 0 takes a free one and logs it."""
    cluster_key_file: str = ""
    """File with the key of scope `server` that the gateway shows for what is no caller's own, and
    for whoever has a signed URL; needed with `keys_file`. It is read again when it changes."""
    training_address: Address = "127.0.0.1:50051"
    """Where the Training server is; it says where the others are. With TLS where
    `cluster_tls_ca_file` is set, which then vouches for what all of them show to callers."""
    base_models: Names = Field({})
    """Further names of base models, each with the servers' name or the folder of that name:
    `{"Qwen/Qwen3-4B-Instruct-2507" = "Qwen3-4B"}`. Clients may use both; they are told the first
    one here."""
    tokenizer_ids: Names = Field({})
    """Names of base models, each with what SDKs load its tokenizer from: a name of a model hub, or
    a folder where the client runs. Others are loaded by a name that the model has."""
    allowed_origins: str = ""
    """Web pages that may call the gateway from a browser, by their origin: `https://host`, several
    with commas between them, or `*` for all. Empty: none; programs that are no web page send no
    origin, and need none."""
    allowed_hosts: str = ""
    """Names, with commas between them, by which callers may reach a gateway that listens on
    loopback and has no keys, such as those that a proxy on its machine passes on; `*` for all.
    Addresses, `localhost`, names without a dot and those of `public_url` and `allowed_origins` are
    fine: any other name could be that of a web page which lets it stand for this machine."""
    body_bytes_max: Positive = 64 * MIB
    """Largest body of one request, before and after it is unpacked; more is 413."""
    body_items_max: Positive = 262_144
    """Most items of one protobuf body: each field that is set, at every level, and each four bytes
    of text. Of a JSON body: most lists and objects, and an eighth of its values. More is 400."""
    received_bytes_max: Positive = 512 * MIB
    """Bytes of all bodies that are held at once; a request that would have more is 429. One peer's
    share of it must hold a body of the largest size before and after it is unpacked."""
    requests_max: Positive = 8192
    """Requests under way at once, those that wait for a result included; more are 429."""
    results_under_way_max: Positive = 16_384
    """Results of SDKs' calls that are not there yet, whether or not a request waits for them; what
    would make more is 429."""
    peer_share_max: AboveZero = Field(0.5, le=1)
    """Share of `requests_max`, `results_under_way_max`, `received_bytes_max` and of the connections
    that one peer may have. A peer is a tenant, or without keys a host: where all callers come
    through one proxy they are one, and this is 1."""
    body_stall_s: AboveZero = 30.0
    """A caller that sends less than 256 KiB of a body within this time, and not its end, is
    answered 408; one whose request's head is not complete by then is cut off."""
    request_s_max: AboveZero = 45.0
    """Longest time that a request which is no long poll waits for the cluster; then it is 503, and
    the SDK sends it again."""
    poll_s_max: AboveZero = Field(30.0, le=40)
    """How long `retrieve_future` waits for a result before it says that there is none yet; SDKs
    give up after 45 seconds."""
    results_bytes_max: Count = 256 * MIB
    """Bytes of results that are kept in case they are asked for again; what is not kept is asked of
    the cluster again."""
    session_idle_s: AboveZero = 120.0
    """A session whose heartbeats have stopped for this long has ended: the samplers that were made
    for it without a name are given back."""
    sampler_idle_s: AboveZero = 3600.0
    """A sampler that was made without a name is held while its session lives and it was used within
    this time; the newest one of a model stays in any case."""
    public_url: str = ""
    """What callers reach this gateway by, such as `https://host/prefix`: what signed URLs begin
    with. Empty: what the request for them came by."""
    signing_key: SecretStr = SecretStr("")
    """Signs the URLs of downloads: 32 or more characters, the same for all gateways behind one
    address. Empty: one is drawn, and URLs end with this process."""
    download_url_s: AboveZero = 3600.0
    """How long such a URL is good for."""
    openai_body_bytes_max: Positive = 8 * MIB
    """Largest body of one request of OpenAI's API: text and numbers as text, which take many times
    as much memory once they are read."""
    openai_choices_max: Positive = 4096
    """Choices that one request of OpenAI's API may ask for: its prompts times `n`."""
    stream_stall_s: AboveZero = 60.0
    """A reader of a stream who takes nothing for this long has it ended, and what is sampled for it
    with it."""
    stop_grace_s: Number = 5.0
    """How long SIGTERM lets requests finish; waiting ones are told at once to ask again."""
    port_file: str = ""
    """File to write the port into once it is bound; empty writes none."""
    metrics_address: OptionalAddress = ""
    """Where Prometheus reads `/metrics`; empty serves and counts none."""

    @model_validator(mode="after")
    def _key_is_long(self) -> Self:
        if 0 < len(self.signing_key.get_secret_value()) < SIGNING_KEY_CHARACTERS_MIN:
            message = f"must have at least {SIGNING_KEY_CHARACTERS_MIN} characters"
            raise broken_rule("signing_key", message)
        return self

    @model_validator(mode="after")
    def _a_share_holds_a_body(self) -> Self:
        if self.received_bytes_max * self.peer_share_max < 2 * self.body_bytes_max:
            message = f"a peer's share of it must hold two times {self.body_bytes_max} bytes"
            raise broken_rule("received_bytes_max", message)
        return self

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        check_keys(self.listen_address, self.keys_file, insecure=self.insecure)
        check_cluster_key(self.keys_file, self.cluster_key_file)
        return self

    def warnings(self) -> list[str]:
        """Say which addresses are reachable from other machines."""
        reachable = self._reachable(self.listen_address, self.metrics_address)
        return reachable + self._plain_calls(self.training_address)
