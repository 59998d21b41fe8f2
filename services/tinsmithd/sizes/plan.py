"""Chooses how a model is spread over GPUs, or says why it does not fit on them.

A GPU gives what its reserve leaves: the driver's and NCCL's own memory, and what the allocator
cannot use. No GPU was at hand to measure that: it is a guess on the safe side, and so is that of a
process's host memory. What is in host memory and on disk follows the engine and the settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinsmithd.sizes.activations import Activations, activations, spread_bytes
from tinsmithd.sizes.architecture import BYTES_OF_DTYPE, Architecture
from tinsmithd.sizes.ranks import RankBytes, away_bytes, by_stage, rank_bytes
from tinsmithd.sizes.weights import active_count, adapter_weights, base_weights, element_count
from tinsmithd.tunings import FullConfig, LoraConfig, Tuning

GB = 1_000_000_000
GIB = 1 << 30
RESERVE_BYTES, RESERVE_SHARE = 2 * GIB, 0.05
"""Of a GPU's memory, that nobody can use."""
PROCESS_BYTES = 4 * GIB
"""Host memory of a rank's process with CUDA's libraries."""
SHM_BYTES = GIB
"""`/dev/shm` of a rank: NCCL's buffers to two neighbours, of up to 32 channels each."""
FREE_SHARE = 0.5
"""As `trainer.compute.memory.SHARE_OF_FREE`: for activations, if no setting says more."""
MICRO_BATCH_TOKENS_MAX, RESIDENT_MODELS_MAX = 2048, 16
"""Defaults of the settings of the same names."""
SNAPSHOTS = 3
"""Of a model, on the Training server's disk: two that are kept, and one that is being written."""
RANKS_TRIED = tuple(1 << power for power in range(11))
"""Numbers of GPUs among which the fewest that suffice are looked for."""


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        gpus: GPUs, one rank on each; None looks for the fewest that suffice.
        gpu_bytes: Memory of a GPU.
        gpus_per_host: GPUs of a host.
        host_bytes: Memory of a host; None leaves it open.
    """

    gpus: int | None = None
    gpu_bytes: int = 80 * GB
    gpus_per_host: int = 8
    host_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """Memory of a GPU without the reserve."""
        return max(0, int(self.gpu_bytes * (1 - RESERVE_SHARE)) - RESERVE_BYTES)


@dataclass(frozen=True)
class Wanted:
    """What is to be trained.

    Attributes:
        tuning: How.
        dtype: Of the frozen base.
        models: Models that are trained at once.
        tokens: Tokens of the longest datum.
        stage: ZeRO stage; None leaves the choice.
        offload: Whether to offload; None leaves the choice.
    """

    tuning: Tuning = field(default_factory=LoraConfig)
    dtype: str = "bfloat16"
    models: int = 1
    tokens: int = MICRO_BATCH_TOKENS_MAX
    stage: int | None = None
    offload: bool | None = None


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over ranks.

    Attributes:
        stage: ZeRO stage.
        offload: Whether optimizer states, and with stage 3 the base, are in host memory.
        sequence_parallel: The setting: number of ranks that compute a long datum together.
        ranks: Number of ranks.
        ranks_per_host: Of them on one host.
        rank: What a rank holds of one model.
        kept_bytes: What all resident models and the base take of the device.
        room_bytes: What is left for activations on each device; below 0 it does not fit.
        activation_bytes_max: The setting that keeps within it; 0 where its default does.
        plain_tokens: Tokens of a micro-batch without recomputation, as far as memory goes.
        datum_tokens_max: Tokens of the longest datum, with recomputation.
        host_bytes: Host memory of one host.
        shm_bytes: `/dev/shm` of one host.
        problem: Why it cannot be; empty where it can.
    """

    stage: int
    offload: bool
    sequence_parallel: int
    ranks: int
    ranks_per_host: int
    rank: RankBytes
    kept_bytes: int
    room_bytes: int
    activation_bytes_max: int
    plain_tokens: int
    datum_tokens_max: int
    host_bytes: int
    shm_bytes: int
    problem: str


@dataclass(frozen=True)
class Plan:
    """What is known of a model on a machine.

    Attributes:
        model: The base model.
        machine: What there is; where nothing said how many GPUs, the fewest that suffice, or those
            of a host if none do.
        wanted: What is to be trained.
        parameter_count: Of the base.
        active_parameter_count: Of them, those that a token passes through.
        adapter_parameter_count: Of an adapter of the wanted shape, or of the default one.
        activations: What a token keeps, in stages 0 to 2.
        stages: For "lora" and "full", what a rank holds in each stage.
        layout: What is recommended; None where nothing fits.
        refusal: Why nothing fits, in a sentence; empty where something does.
    """

    model: Architecture
    machine: Machine
    wanted: Wanted
    parameter_count: int
    active_parameter_count: int
    adapter_parameter_count: int
    activations: Activations
    stages: Mapping[str, Mapping[int, RankBytes]]
    layout: Layout | None
    refusal: str

    @property
    def trained_count(self) -> int:
        """Elements that are trained of one model."""
        is_adapter = self.wanted.tuning.is_adapter
        return self.adapter_parameter_count if is_adapter else self.parameter_count

    @property
    def weights_bytes(self) -> int:
        """Of a checkpoint of kind SAMPLER."""
        return 4 * self.trained_count

    @property
    def state_bytes(self) -> int:
        """Of a snapshot, and of a checkpoint of kind TRAINING: values and two moments."""
        return 12 * self.trained_count

    @property
    def base_files_bytes(self) -> int:
        """Of the base model's files."""
        return self.model.file_dtype_bytes * self.parameter_count

    @property
    def snapshots_bytes(self) -> int:
        """Of all models on the Training server's disk, journal apart."""
        return SNAPSHOTS * self.state_bytes * self.wanted.models

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values in a Sampler."""
        element = BYTES_OF_DTYPE[self.wanted.dtype]
        return 2 * self.model.layer_count * self.model.kv_size * element

    @property
    def sampler_bytes(self) -> int:
        """Of the base model in a Sampler."""
        return BYTES_OF_DTYPE[self.wanted.dtype] * self.parameter_count

    @property
    def sampler_tokens(self) -> int:
        """Tokens whose keys and values fit beside it on one GPU; 0 where it does not fit."""
        return max(0, self.machine.usable_bytes - self.sampler_bytes) // self.kv_bytes


def make_plan(model: Architecture, machine: Machine, wanted: Wanted) -> Plan:
    """Plan a model."""
    tuning = wanted.tuning.on_base(model.experts_of_token)
    wanted = replace(wanted, tuning=tuning)
    default = LoraConfig().on_base(model.experts_of_token)
    lora = tuning if isinstance(tuning, LoraConfig) else default
    tried = [machine.gpus] if machine.gpus is not None else list(RANKS_TRIED)
    layout, refused = None, list[Layout]()
    for ranks in tried:
        refused = []
        for candidate in _candidates(model, machine, wanted, ranks):
            if not candidate.problem:
                layout = candidate
                break
            refused.append(candidate)
        if layout is not None:
            break
    ranks = layout.ranks if layout is not None else machine.gpus or machine.gpus_per_host
    return Plan(
        model=model,
        machine=replace(machine, gpus=ranks),
        wanted=wanted,
        parameter_count=element_count(base_weights(model)),
        active_parameter_count=active_count(model),
        adapter_parameter_count=element_count(adapter_weights(model, lora)),
        activations=activations(
            model,
            tuning,
            dtype=dtype_of(wanted),
            partitioned=False,
            gpu_bytes=machine.gpu_bytes,
        ),
        stages={
            "lora": by_stage(model, lora, dtype=wanted.dtype, ranks=ranks),
            "full": by_stage(model, FullConfig(), dtype=wanted.dtype, ranks=ranks),
        },
        layout=layout,
        refusal="" if layout is not None else _refusal(model, machine, wanted, refused),
    )


def dtype_of(wanted: Wanted) -> str:
    """Of the weights that compute: trained ones are float32."""
    return wanted.dtype if wanted.tuning.is_adapter else "float32"


def _candidates(
    model: Architecture, machine: Machine, wanted: Wanted, ranks: int
) -> Iterator[Layout]:
    """Layouts from the quickest on. Stage 2 is stage 1 here, since gradients wait outside ZeRO."""
    stages = (0, 3) if ranks == 1 else (1, 3)
    for offload in (False, True) if wanted.offload is None else (wanted.offload,):
        for stage in stages if wanted.stage is None else (wanted.stage,):
            if offload and not stage:
                continue
            for together in _together(model, ranks):
                layout = _layout(model, machine, wanted, ranks, stage, offload, together)
                yield layout
                if layout.room_bytes <= 0:
                    break  # a datum on more ranks leaves no more room


def _together(model: Architecture, ranks: int) -> Iterator[int]:
    """Numbers of ranks that may compute a datum together, as `trainer.compute.spread` says."""
    heads, kv_heads = model.head_count, model.kv_head_count
    for count in range(1, ranks + 1):
        if not (ranks % count or heads % count or (kv_heads % count and count % kv_heads)):
            yield count


def _layout(
    model: Architecture,
    machine: Machine,
    wanted: Wanted,
    ranks: int,
    stage: int,
    offload: bool,
    together: int,
) -> Layout:
    tuning = wanted.tuning
    rank = rank_bytes(model, tuning, dtype=wanted.dtype, stage=stage, ranks=ranks, offload=offload)
    kept_by = activations(
        model,
        tuning,
        dtype=dtype_of(wanted),
        partitioned=stage == 3 and tuning.is_adapter,
        gpu_bytes=machine.gpu_bytes,
    )
    resident = min(wanted.models, RESIDENT_MODELS_MAX)
    base = rank.base - (rank.base if offload and stage == 3 else 0)
    kept = base + resident * (rank.on_device - base)
    needed = rank.gathered + rank.call + kept_by.head_bytes
    room = machine.usable_bytes - kept - needed
    # The engine takes half of what is free when only the base is there.
    at_start = base if tuning.is_adapter else rank.values - (rank.values if offload else 0)
    by_default = int(FREE_SHARE * max(0, machine.usable_bytes - at_start))
    budget = max(0, min(room, by_default))
    # While a layer is recomputed, its activations and their gradients are there besides.
    layer = kept_by.layer_bytes + spread_bytes(model, dtype=dtype_of(wanted), ranks=together)
    datum = kept_by.recomputed_bytes + 2 * layer
    here = min(ranks, machine.gpus_per_host)
    host = _host_bytes(model, wanted, rank, here, ranks, stage)
    layout = Layout(
        stage=stage,
        offload=offload,
        sequence_parallel=together,
        ranks=ranks,
        ranks_per_host=here,
        rank=rank,
        kept_bytes=kept,
        room_bytes=room,
        activation_bytes_max=budget if 0 < budget < by_default else 0,
        plain_tokens=budget // max(1, kept_by.plain_bytes),
        datum_tokens_max=min(together * max(0, room) // max(1, datum), model.context_length),
        host_bytes=host,
        shm_bytes=here * SHM_BYTES,
        problem="",
    )
    return replace(layout, problem=_problem(machine, wanted, layout, needed))


def _host_bytes(
    model: Architecture, wanted: Wanted, rank: RankBytes, here: int, ranks: int, stage: int
) -> int:
    """Host memory of one host."""
    tuning, later = wanted.tuning, rank.offloaded
    if isinstance(tuning, LoraConfig):
        away = max(0, wanted.models - RESIDENT_MODELS_MAX)
        later += away * away_bytes(model, tuning, ranks, stage)
        state = 12 * element_count(adapter_weights(model, tuning))
    else:
        state = 12 * element_count(base_weights(model))
    # A state that is loaded is whole on each rank of a group; one that is saved on the first.
    return here * (PROCESS_BYTES + later + state)


def _problem(machine: Machine, wanted: Wanted, layout: Layout, needed: int) -> str:
    stage = f"ZeRO stage {layout.stage}"
    if layout.offload:
        stage += " with offload"
    if layout.room_bytes <= 0:
        return f"{stage} needs {gb(layout.kept_bytes + needed)} before any activations"
    if layout.datum_tokens_max < wanted.tokens:
        tokens = f"{layout.datum_tokens_max:,} tokens"
        if layout.sequence_parallel > 1:
            tokens += f" on {layout.sequence_parallel} ranks"
        return f"{stage} has room for a datum of {tokens}, with recomputation"
    if machine.host_bytes is not None and layout.host_bytes > machine.host_bytes:
        ranks = f"{layout.ranks_per_host} rank(s) on it"
        return f"{stage} needs {gb(layout.host_bytes)} of host memory with {ranks}"
    return ""


def _refusal(
    model: Architecture, machine: Machine, wanted: Wanted, refused: Sequence[Layout]
) -> str:
    what = "a LoRA adapter" if wanted.tuning.is_adapter else "all weights"
    if machine.gpus is None:
        where = f"GPUs of {gb(machine.gpu_bytes)}, up to {RANKS_TRIED[-1]:,} of them"
    else:
        where = f"{machine.gpus} GPU(s) of {gb(machine.gpu_bytes)}"
    if machine.host_bytes is not None:
        where += f" in hosts of {gb(machine.host_bytes)}"
    wish = f"{what} with data of {wanted.tokens:,} tokens"
    # The layouts with offload come last, and need the least of their stage.
    why = "; ".join({layout.stage: layout.problem for layout in refused}.values())
    have = f"{gb(machine.usable_bytes)} of each GPU can be used"
    return f"{model.name}: {wish} cannot be trained on {where}, of which {have}: {why}"


def gb(number: int) -> str:
    """Bytes for a person."""
    return f"{number / GB:,.1f} GB"
