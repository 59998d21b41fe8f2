"""Settings of a Sampler."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from tinsmithd.config.base import ServerConfig, check_cluster_key
from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import (
    MIB,
    AboveZero,
    Address,
    Count,
    NativeUse,
    Number,
    Positive,
    Required,
    SamplerDtype,
    SamplerEngine,
)


class SamplerConfig(ServerConfig):
    """A Sampler server."""

    section: ClassVar[str] = "sampler"

    listen_address: Address = "127.0.0.1:50052"
    """Where to listen; port 0 takes a free one and logs it."""
    message_bytes_max: Count = 8 * MIB
    """Largest message received: a prompt of a million tokens."""
    base_model: Required
    """Hugging Face name or folder."""
    engine: SamplerEngine = "transformers"
    """What computes; `transformers` runs everywhere, `vllm` needs `tinsmith[vllm]`."""
    dtype: SamplerDtype = "auto"
    """Element type of the frozen weights; `auto` is float32 where compiled kernels compute (see
    `native`), else bfloat16 where it is native to the machine and a short test finds it faster;
    with engine `vllm` that of the model's files. Set it where several Samplers are to give the same
    tokens for a seed."""
    cluster_key_file: str = ""
    """File with the key of scope `server` that this process shows to other servers; needed with
    `keys_file`. It is read again when it changes."""
    checkpoint_target: str = "127.0.0.1:50053"
    """Where this server reaches the Checkpoint server, or several over one object store: a name
    with several addresses, or `ipv4:10.0.0.1:50053,10.0.0.2:50053`."""
    checkpoint_answer_s_max: AboveZero = 30.0
    """A call to the Checkpoint server that moves no data is given up after this long, and so is a
    read whose connection broke and that cannot go on."""
    checkpoint_stall_s_max: AboveZero = 60.0
    """A call to the Checkpoint server that moves data is given up when nothing moves for this long;
    a slow one is waited for."""
    checkpoint_folder: str = ""
    """The Checkpoint server's `data_folder`, where this server can read it: adapters are then read
    there. Empty: they are sent."""
    checkpoint_recheck_s: Number = 10.0
    """How often this server asks whether a checkpoint that it serves from memory is still there."""
    tenant_samples_max: Count = 0
    """Calls of one tenant that are computed here or wait for it; 0: no limit. The file of keys may
    say another one for some tenants, as of the next."""
    tenant_tokens_per_minute_max: Count = 0
    """Tokens of prompts, and those that may follow them, that one tenant may have computed here in
    a minute; 0: no limit. Those that were not made are given back."""
    num_samples_max: Count = 256
    """Sequences of one call."""
    chunks_max: Count = 1024
    """Chunks of one prompt."""
    stops_max: Count = 64
    """Stop tokens of one call, and stop strings."""
    stop_characters_max: Count = 1024
    """Characters of one stop string."""
    topk_max: Count = 64
    """Tokens that a call may ask for at each position: likeliest ones, and drawn ones."""
    alternatives_max: Count = 1024 * 1024
    """Alternatives of one call at all positions of its prompt and its samples together: bounds its
    answer, which has 8 bytes for each, and while it is made about 30."""
    concurrent_calls_max: Positive = 4096
    """Calls under way at once, waiting ones included; more are RESOURCE_EXHAUSTED. Health's `Check`
    is not counted."""
    running_max: Positive = 128
    """Calls that are computed at once."""
    batch_rows_max: Positive = 256
    """Sequences that are computed at once; a call that alone has more is computed alone."""
    waiting_max: Count = 4096
    """Calls that wait for their turn; more are RESOURCE_EXHAUSTED."""
    kv_cache_bytes_max: Positive = 8 * 1024 * MIB
    """Keys and values of the sequences that are computed, which have room for the most that they
    can come to; memory is taken as they grow. A call that alone needs more is refused."""
    prefix_cache_bytes_max: Count = 512 * MIB
    """Keys and values of prompts that are kept for later calls with the same beginning."""
    batch_invariance: bool = True
    """Give each sequence the same bits whatever is computed beside it, also on a machine where that
    takes longer; `GetCapabilities` says what holds."""
    prefill_tokens_per_step_max: Positive = 512
    """Tokens of prompts that are read at once, between two tokens of the sequences under way."""
    adapters_bytes_max: Count = 8 * 1024 * MIB
    """Adapters in memory, as float32; the one that was used longest ago goes first, and a call
    waits while all of them are in use."""
    adapters_max: Positive = 256
    """Adapters in memory, whatever their size."""
    rank_max: Count = 256
    """Largest LoRA rank that is served; as `training.rank_max`."""
    adapter_bytes_max: Count = 8 * 1024 * MIB
    """Largest checkpoint that is fetched."""
    ahead_bytes_max: Count = 64 * MIB
    """Largest checkpoint that is fetched as soon as it is saved, before a call asks for it; 0:
    none. Those that no call has asked for have a quarter of adapters_bytes_max together."""
    fetches_max: Positive = 16
    """Adapters that are fetched at once, or wait in memory for their turn to be loaded."""
    sample_tokens_max: Count = 131_072
    """num_samples times prompt and max_tokens: bounds the KV cache of a call."""
    threads: Count = 0
    """CPU threads of engine `transformers`; 0 leaves it to torch."""
    native: NativeUse = "exact"
    """With engine `transformers`, on a CPU: compute with kernels that the machine's C compiler
    makes at the first start, where they can be had and agree with torch: `exact` where they compute
    what a trainer does, which is so in float32 and in bfloat16, where they round as torch rounds;
    so `always` is the same. `never`: not."""
    native_folder: str = ""
    """Where those kernels are kept; nobody but this user and root may write there. Empty: in
    `tinsmith/native` of the user's cache folder."""
    vllm_tensor_parallel_size: Count = 0
    """With engine `vllm`: GPUs that hold the model together; 0 leaves it to vLLM, as in all that
    follow."""
    vllm_memory_share: Number = Field(0.0, le=1)
    """With engine `vllm`: share of each GPU's memory that it takes."""
    vllm_kv_cache_bytes_max: Count = 0
    """With engine `vllm`: keys and values, on a CPU above all."""
    vllm_context_tokens_max: Count = 0
    """With engine `vllm`: tokens of a prompt and its completion; 0 is what the model was made
    for."""
    vllm_rank_max: Positive = Field(32, le=512)
    """With engine `vllm`: largest LoRA rank that is served. Room for it is taken at the start."""
    vllm_batch_adapters_max: Positive = 8
    """With engine `vllm`: adapters of which sequences are computed at once. Room for them is taken
    at the start."""

    def warnings(self) -> list[str]:
        """Say what goes over a network that others may reach."""
        return super().warnings() + self._plain_calls(self.checkpoint_target)

    @model_validator(mode="after")
    def _what_is_fetched_has_room(self) -> Self:
        if self.adapters_bytes_max < self.adapter_bytes_max:
            message = f"must be at least adapter_bytes_max, {self.adapter_bytes_max}"
            raise broken_rule("adapters_bytes_max", message)
        return self

    @model_validator(mode="after")
    def _a_server_has_a_key(self) -> Self:
        check_cluster_key(self.keys_file, self.cluster_key_file)
        return self
