"""Settings of the ranks."""

from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator

from tinsmithd.config.base import Config
from tinsmithd.config.errors import broken_rule
from tinsmithd.config.fields import (
    LINK_ADDRESS,
    Count,
    Determinism,
    Dtype,
    Number,
    OptionalAddress,
    Positive,
    Required,
    TrainerEngine,
    ZeroStage,
)


class TrainerConfig(Config):
    """One rank of a rank group, or with `ranks` the group: as many as there are devices."""

    section: ClassVar[str] = "trainer"

    training_target: str = LINK_ADDRESS
    """Where rank 0 attaches: `link_address` of the Training server."""
    link_secret_file: str = ""
    """File with the secret that the Training server demands; rank 0 alone needs it."""
    launch_token: SecretStr = SecretStr("")
    """Given out by a Training server that starts its ranks, which knows them by it."""
    ranks: Count = 1
    """Ranks on this machine; 0 is one for each NVIDIA GPU that the process has. Where torchrun
    starts them, it says how many."""
    nodes: Positive = 1
    """Machines that a rank group is on, each with as many ranks."""
    node: str = Field("0", max_length=253)
    """Which of them this is, from 0: a number, or a name that ends with one, such as a pod's. From
    `nodes` on it is one of another group, which stands by."""
    meet_address: OptionalAddress = ""
    """Where the group's first machine listens for the others, host:port; `{first}` stands for its
    name, which is `node` with that machine's number. No one else may reach the machines of a group:
    the ports that ranks open to each other ask for no secret."""
    restart: bool = False
    """Start the ranks again here when they end, instead of ending with them; for pods."""
    base_model: Required
    """Hugging Face name or folder."""
    dtype: Dtype = "float32"
    """Element type of the frozen weights."""
    engine: TrainerEngine = "deepspeed"
    """What computes: deepspeed, or reference, the plain single-process one."""
    zero_stage: ZeroStage = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 and 2 optimizer states, 3 the base too is partitioned."""
    offload: bool = False
    """Keep optimizer states and, with stage 3, the base in host memory."""
    gathered_bytes_max: Count = 0
    """Stage 3: bytes of the base that a rank keeps whole once they were gathered."""
    micro_batch_tokens_max: Positive = 2048
    """Tokens that a rank computes together; a longer datum goes alone."""
    share_prefixes: bool = True
    """Compute tokens that several data of a call begin with once: those of a prompt with many
    rollouts."""
    sequence_parallel: Positive = 1
    """Neighbouring ranks that compute a longer datum together, each a share of its tokens, where it
    does not fit into one rank's memory or would keep the other ranks waiting; 1: none do."""
    tensor_parallel: Positive = 1
    """Nothing but 1 is built: each rank computes whole layers."""
    expert_parallel: Positive = 1
    """Nothing but 1 is built: each rank computes all experts of its tokens."""
    activation_bytes_max: Count = 0
    """What a rank keeps for the way back before it recomputes; 0 is half of what is free."""
    deterministic: Determinism = "auto"
    """Whether GPUs give the same bits each time, so that calls that are made again after a crash
    can be held to them: always, never, or where it costs at most 5 %, which is measured at the
    start. CPUs always do."""
    resident_models_max: Positive = 16
    """Models on the device at once; the others wait in host memory."""
    threads: Count = 0
    """CPU threads per rank; 0 leaves it to torch."""
    collective_timeout_s: Number = Field(30.0, ge=1)
    """A rank that shows no life for this long ends the group; to compute for long is no silence."""
    progress_timeout_s: Number = Field(300.0, ge=1)
    """A group that gets nothing done with a command for this long, no layer, micro-batch or
    collective on any rank, and for ten times as long as that ever took, ends."""

    def warnings(self) -> list[str]:
        """Say what goes over a network that others may reach."""
        return self._plain_calls(self.training_target)

    @model_validator(mode="after")
    def _what_is_not_built_is_refused(self) -> Self:
        instead = "zero_stage = 3 spreads weights over the ranks, sequence_parallel long data"
        for key, kind in (("tensor_parallel", "tensor"), ("expert_parallel", "expert")):
            if getattr(self, key) > 1:
                raise broken_rule(key, f"{kind} parallelism is not built; {instead}")
        return self

    @model_validator(mode="after")
    def _one_process_spreads_nothing(self) -> Self:
        if self.engine == "reference" and self.sequence_parallel > 1:
            message = "the reference engine computes in one process, so it must be 1"
            raise broken_rule("sequence_parallel", message)
        return self
