# Copyright (c) 2026, the megatron-core gptoss authors.

"""Peak memory of the peak-memory rank of a run, in bytes of live tensors.

It predicts torch.cuda.max_memory_allocated. CUDA, NCCL and fragmentation of the allocator need
memory in addition (`default_reserve`). A card has more bytes than the number in its name
(`CARD_BYTES`), which covers most of that.
"""

from dataclasses import dataclass, fields
from functools import cached_property

from megatron.gpt_oss.planner.activations import HeadActivations, LayerActivations, MicroBatch
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.parameters import expert_fp8_copies, rank_parameters, stage_layers

GB = 10**9
# The most that CUDA, NCCL and fragmentation of the allocator took: on four GPUs, on one or two
# (docs/planning.md).
RESERVE, RESERVE_OF_TWO = 8 * GB, 5 * GB
# Measured bytes of cards by the number in their name (H100, H200). Other cards are taken at their
# number: a B200 of "192 GB" has less than that.
CARD_BYTES = {80: 84.9 * GB, 141: 150.1 * GB}
# Assumed share of a machine's CPU memory for the optimizer; processes, data and the operating
# system need the rest.
CPU_MEMORY_SHARE = 0.9
# Bytes per element: bf16 weight; in fp32, master weight and two moments of AdamW.
WEIGHT, MASTER, MOMENTS = 2, 4, 8

# The parts of a rank's memory: fields of Memory.
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "optimizer_step")
# How the phases of a step are printed.
PHASE_NAMES = {
    "forward_experts": "forward: experts",
    "forward_combine": "forward: combine",
    "forward_unpermute": "forward: unpermute",
    "recompute_experts": "recompute: experts",
    "recompute_combine": "recompute: combine",
    "recompute_unpermute": "recompute: unpermute",
    "loss": "loss",
    "loss_grad": "loss gradient",
    "output_layer_grad": "output layer gradient",
    "backward_combine": "backward: combine",
    "backward_linear_fc2": "backward: linear_fc2",
    "backward_activation": "backward: activation",
    "backward_linear_fc1": "backward: linear_fc1",
    "backward_attention": "backward: attention",
    "embedding_grad": "embedding gradient",
    "optimizer_step": "optimizer step",
}


@dataclass(frozen=True)
class PhaseBytes:
    """Bytes live in one phase, in addition to parameters, gradients and optimizer state."""

    activations: int
    logits: int = 0
    optimizer_step: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.optimizer_step


@dataclass(frozen=True)
class StepPhases:
    """The phases of a step that may be the peak; None: the rank does not have this phase."""

    forward_experts: PhaseBytes | None = None
    forward_combine: PhaseBytes | None = None
    forward_unpermute: PhaseBytes | None = None
    recompute_experts: PhaseBytes | None = None
    recompute_combine: PhaseBytes | None = None
    recompute_unpermute: PhaseBytes | None = None
    loss: PhaseBytes | None = None
    loss_grad: PhaseBytes | None = None
    output_layer_grad: PhaseBytes | None = None
    backward_combine: PhaseBytes | None = None
    backward_linear_fc2: PhaseBytes | None = None
    backward_activation: PhaseBytes | None = None
    backward_linear_fc1: PhaseBytes | None = None
    backward_attention: PhaseBytes | None = None
    embedding_grad: PhaseBytes | None = None
    optimizer_step: PhaseBytes | None = None

    def present(self) -> dict[str, PhaseBytes]:
        """The phases of this rank by field, in the order of the step."""
        return {name: phase for name, phase in vars(self).items() if phase is not None}

    def peak(self) -> str:
        """The field of the phase with the most bytes."""
        present = self.present()
        return max(present, key=lambda name: present[name].total)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters, gradients, optimizer: allocated during the complete step; parameters with their
            FP8 copies.
        phases: allocated in some phase of the step.
        cpu_memory: of the offloaded optimizer; not in the total.
        stage: the pipeline rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    phases: StepPhases
    cpu_memory: int
    stage: int

    @cached_property
    def peak_phase(self) -> str:
        """Field of the phase at the peak."""
        return self.phases.peak()

    @property
    def total(self) -> int:
        """Bytes on the GPU at the peak."""
        peak = getattr(self.phases, self.peak_phase).total
        return self.parameters + self.gradients + self.optimizer + peak

    @property
    def activations(self) -> int:
        """The maximum over the phases, as for logits and optimizer_step."""
        return max(phase.activations for phase in self.phases.present().values())

    @property
    def logits(self) -> int:
        return max(phase.logits for phase in self.phases.present().values())

    @property
    def optimizer_step(self) -> int:
        return max(phase.optimizer_step for phase in self.phases.present().values())

    def as_dict(self) -> dict:
        """Entries for JSON, in bytes."""
        phases = {name: phase.total for name, phase in self.phases.present().items()}
        parts = ("activations", "logits", "optimizer_step", "peak_phase", "total")
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "phases": phases, **{name: getattr(self, name) for name in parts}}


def peak_rank_memory(layout: Layout) -> Memory:
    """Memory of the peak-memory rank.

    The first pipeline rank holds the most micro-batches, the last one has the loss.
    """
    stages = {0, min(1, layout.pp - 1), layout.pp - 1}
    return max((stage_memory(layout, stage) for stage in sorted(stages)), key=lambda m: m.total)


def stage_memory(layout: Layout, stage: int) -> Memory:
    """Memory of a pipeline rank."""
    dense, expert = rank_parameters(layout, stage)
    optimizer = optimizer_memory(layout, dense, expert)
    buffer = gather_buffer(layout)
    return Memory(
        parameters=WEIGHT * (dense + expert) + expert_fp8_copies(layout, stage),
        gradients=layout.grad_bytes * (dense + expert),
        optimizer=optimizer.gpu,
        phases=StageActivations(layout, stage).phases(buffer, optimizer.step),
        cpu_memory=optimizer.cpu,
        stage=stage,
    )


def card_memory(gigabytes: float) -> float:
    """Bytes of a card by the number in its name."""
    return CARD_BYTES.get(gigabytes, gigabytes * GB)


def default_reserve(gpus: int) -> int:
    """Bytes of a card for CUDA, NCCL and fragmentation of the allocator."""
    return RESERVE if gpus > 2 else RESERVE_OF_TWO


def rank_cpu_memory(layout: Layout) -> int:
    """CPU memory of the offloaded optimizer, of the rank that needs the most."""
    if not layout.offload:
        return 0
    stages = {0, layout.pp - 1}
    return max(optimizer_memory(layout, *rank_parameters(layout, stage)).cpu for stage in stages)


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of master weights and moments on GPU and CPU, and of temporaries of a step."""

    gpu: int
    cpu: int
    step: int


def optimizer_memory(layout: Layout, dense: int, expert: int) -> OptimizerMemory:
    """Memory of the optimizer of a rank.

    Args:
        dense, expert: elements of the rank outside and inside experts.
    """
    if layout.distributed_optimizer:
        dense = -(-dense // (layout.dp * layout.cp))
        expert = -(-expert // layout.expert_dp)
    offloaded = round((MASTER + MOMENTS) * (dense + expert) * layout.offload)
    gradients = round(4 * (dense + expert) * layout.offload)
    # AdamW is one kernel and gradients are clipped in place. Gradients in bf16 are copied to fp32.
    copied = 0 if layout.grad_bytes == 4 else round(4 * (dense + expert) * (1 - layout.offload))
    return OptimizerMemory(
        gpu=(MASTER + MOMENTS) * (dense + expert) - offloaded,
        cpu=offloaded + gradients,
        step=copied,
    )


def gather_buffer(layout: Layout) -> int:
    """Bytes of the buffer into which sequence parallelism gathers inputs; it stays allocated."""
    if not layout.sequence_parallel or layout.tp == 1:
        return 0
    return 2 * MicroBatch.from_layout(layout).tokens * layout.preset.hidden_size


class StageActivations:
    """Activations of a pipeline rank, and its phases.

    Args:
        device: 'cuda' or 'cpu'.
    """

    def __init__(self, layout: Layout, stage: int, device: str = "cuda"):
        self.layout, self.stage, self.device = layout, stage, device
        by_kind = {kind: LayerActivations(layout, kind, device) for kind in (True, False)}
        numbers = stage_layers(layout, stage)
        self.layers = [by_kind[layout.preset.is_windowed(number)] for number in numbers]
        self.sizes = self.layers[0].sizes
        self.head = HeadActivations(layout, device) if stage == layout.pp - 1 else None

    @cached_property
    def saved(self) -> int:
        """Bytes that the layers save of one micro-batch."""
        recompute = self.layout.recompute
        count = len(self.layers)
        preset = self.layout.preset
        angles = 4 * self.sizes.length * preset.head_dim  # shared by all layers
        if recompute.granularity != "full":
            shared = angles if self.device == "cuda" else 0  # the CPU saves cos and sin instead
            return shared + sum(layer.saved for layer in self.layers)
        inputs = 2 * self.sizes.residual * preset.hidden_size
        if recompute.method == "block":
            recomputed = min(recompute.num_layers, count)
            rest = sum(layer.all_saved for layer in self.layers[recomputed:])
            return recomputed * inputs + angles + rest
        return -(-count // recompute.num_layers) * inputs + angles

    def in_flight(self) -> float:
        """Micro-batches (of all model chunks) whose activations are saved at the same time."""
        layout = self.layout
        pp, chunks = layout.pp, layout.virtual_stages
        if chunks == 1:
            return min(pp - self.stage, layout.microbatches)
        warm_up = (pp - self.stage - 1) * 2 + (chunks - 1) * pp + 1
        return min(warm_up, layout.microbatches * chunks) / chunks

    def phases(self, buffer: int = 0, optimizer_step: int = 0) -> StepPhases:
        """The phases of a step.

        Args:
            buffer: bytes that are allocated in all of them.
            optimizer_step: bytes of temporaries of the optimizer.
        """
        batch = 32 * self.sizes.tokens
        all_saved = round(self.saved * self.in_flight()) + batch + buffer
        found = self._last_layer_phases(all_saved)
        if self.head is not None:
            base = all_saved + self.head.norm
            for name, size in vars(self.head.phases()).items():
                found[name] = None if size is None else PhaseBytes(base, logits=size)
        if self.stage == 0:
            found["embedding_grad"] = PhaseBytes(all_saved - self.saved + self._embedding_grad())
        return StepPhases(**found, optimizer_step=PhaseBytes(buffer, optimizer_step=optimizer_step))

    def _last_layer_phases(self, all_saved: int) -> dict[str, PhaseBytes]:
        """Forward, or recomputation, and backward of the last layer, by field of StepPhases."""
        last = self.layers[-1]
        others = all_saved - (0 if self._recomputes_last_layer() else last.saved)
        forward = "forward"
        if self.layout.recompute.recomputes("moe") or self._recomputes_last_layer():
            forward = "recompute"
            # The gradient of the output, and the layers of the same recompute unit.
            others += 2 * self.sizes.residual * self.layout.preset.hidden_size
            others += self._saved_in_unit()
        return {
            f"{prefix}_{name}": PhaseBytes(others + size)
            for prefix, phases in (
                (forward, last.forward_phases()),
                ("backward", last.backward_phases()),
            )
            for name, size in vars(phases).items()
        }

    def _embedding_grad(self) -> int:
        vocabulary = self.layout.preset.vocab_size // self.layout.tp
        return 2 * (vocabulary + self.sizes.tokens) * self.layout.preset.hidden_size

    def _recomputes_last_layer(self) -> bool:
        """Whether full recomputation, which begins with the first layer, includes the last."""
        recompute = self.layout.recompute
        if recompute.granularity != "full":
            return False
        return recompute.method != "block" or recompute.num_layers >= len(self.layers)

    def _saved_in_unit(self) -> int:
        """Bytes of the layers that are recomputed together with the last (method uniform)."""
        recompute = self.layout.recompute
        if recompute.granularity != "full" or recompute.method == "block":
            return 0
        unit = min(recompute.num_layers, len(self.layers))
        return sum(layer.all_saved for layer in self.layers[len(self.layers) - unit : -1])
