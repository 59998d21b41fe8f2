"""Settings of the gateway."""

from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from tinsmithd.config.base import Config, broken_rule, warnings_of
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


class GatewaySettings(Config):
    """The gateway: HTTP for stock Tinker SDKs and OpenAI clients. It holds nothing that a restart
    may lose, and any number of them may stand behind one address."""

    section: ClassVar[str] = "gateway"

    listen_address: Address = "127.0.0.1:8080"
    """Where to listen; port 0 takes a free one and logs it."""
    training_address: Address = "127.0.0.1:50051"
    """Where the Training server is; it says where the others are."""
    base_models: Names = Field({})
    """Further names of base models, each with the servers' name or the folder of that name:
    `{"Qwen/Qwen3-4B-Instruct-2507" = "Qwen3-4B"}`. Clients may use both; they are told the first
    one here."""
    tokenizer_ids: Names = Field({})
    """Names of base models, each with what SDKs load its tokenizer from: a name of a model hub, or
    a folder where the client runs. Others are loaded by a name that the model has."""
    body_bytes_max: Positive = 64 * MIB
    """Largest body of one request, before and after it is unpacked; more is 413."""
    body_items_max: Positive = 262_144
    """Most items of one protobuf body: each field that is set, at every level, and each four bytes
    of text; more is 400."""
    received_bytes_max: Positive = 512 * MIB
    """Bytes of all bodies that are held at once; a request that would have more is 429."""
    requests_max: Positive = 8192
    """Requests under way at once, those that wait for a result included; more are 503."""
    body_stall_s: AboveZero = 30.0
    """A caller that sends nothing of a body that is not complete for this long is answered 408; one
    whose request's head is not complete by then is cut off."""
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

    def warnings(self) -> list[str]:
        """Say which addresses are reachable from other machines."""
        return warnings_of(self.listen_address, self.metrics_address)
