# Copyright (c) 2026, the megatron-core gptoss authors.

"""Time of a step: FLOPs and bytes divided by rates.

The rates are measured (rates.json), or assumed: these are the constants below. Kernel launches,
Python and data loading are not included, so this is a lower bound.
"""

from dataclasses import dataclass

from megatron.gpt_oss.planner.activations import MicroBatch
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.planner.parameters import layer_parameters, rank_parameters, stage_layers
from megatron.gpt_oss.planner.rates import Rates
from megatron.gpt_oss.training.metrics.flops import visible_pairs

# Assumed, bytes/s per GPU and direction: 450e9 of NVLink 4 and 50e9 of a 400 Gb/s adapter, with
# what collectives commonly reach of them; half of PCIe 5 x16.
WITHIN_MACHINE = 300e9
BETWEEN_MACHINES = 40e9
CPU_LINK = 25e9
# Bytes/s of CPU memory per rank: 54e9 by benchmarks/results/whole_model_two_h200x2.json, two ranks
# on a machine of four GPUs.
CPU_MEMORY = 50e9

# Bytes that memory-bound kernels read and write, counted in the code. Per element of the optimizer
# state (AdamW's kernel 28, norm 4, clipping 8, weight 6), and to clear a gradient.
ADAM, CLEAR = 46, 4
# Per logit. All at once: GEMM output 2, to fp32 6, maximum 4, subtraction 8, exponential 8, sum 4,
# division 8, gradient 8, to bf16 6, its two reads 4. In chunks: GEMM output 2, two kernels 2 and 4,
# two reads 4.
LOGIT, CHUNKED_LOGIT = 58, 12
# Per hidden element of a token and layer, forward: two norms 8, two residuals with bias 12; the
# backward takes twice as many. Per element of query, key and value: bias 4, rotation 4.
HIDDEN, ROTARY = 20, 8

# How the parts of a step are printed.
TIME_NAMES = {
    "attention": "attention",
    "expert_gemms": "expert GEMMs",
    "dense_gemms": "dense GEMMs",
    "memory_bound": "memory-bound kernels",
    "model_parallel_comm": "TP, EP, PP communication",
    "pipeline_bubble": "pipeline bubble",
    "data_parallel_comm": "DP communication",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank.

    Attributes:
        dense_gemms: linear layers outside experts, and the output layer.
        model_parallel_comm: of tensor, expert and pipeline parallelism.
        data_parallel_comm: gradient reduction and parameter gather.
    """

    attention: float
    expert_gemms: float
    dense_gemms: float
    memory_bound: float
    model_parallel_comm: float
    pipeline_bubble: float
    data_parallel_comm: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def step_time(
    layout: Layout,
    rates: Rates | None = None,
    backend: str = "cudnn",
    machines: Machines | None = None,
) -> StepTime:
    """Estimate the time of a step.

    Args:
        rates: the packaged ones by default.
        backend: of attention, one of rates.json.
        machines: their GPUs are connected by NVLink; eight each by default.
    """
    machines = machines or Machines.guessed(layout.gpus)
    estimate = _StepEstimate(layout, rates or Rates(), backend, machines)
    stages = [estimate.micro_batch(stage) for stage in range(layout.pp)]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    all_stages = sum(sum(parts.values()) for parts in stages)
    # The first micro-batch passes all stages, the others follow the slowest stage.
    bubble = (all_stages - sum(slowest.values())) / layout.virtual_stages
    return StepTime(
        **{name: seconds * layout.microbatches for name, seconds in slowest.items()},
        pipeline_bubble=bubble,
        data_parallel_comm=estimate.data_parallel_comm(),
        optimizer=estimate.optimizer(),
    )


class _StepEstimate:
    """Seconds of the parts of a step.

    Attributes:
        recompute, expert_recompute: fraction of the layers (of the experts) whose forward is
            recomputed. It costs a third of the time of GEMMs and 2 of the 7 units of attention.
    """

    def __init__(self, layout: Layout, rates: Rates, backend: str, machines: Machines):
        self.layout, self.rates, self.backend = layout, rates, backend
        self.machines = machines
        self.sizes = MicroBatch.from_layout(layout)
        full = layout.recompute.granularity == "full"
        self.recompute = full
        self.expert_recompute = full or layout.recompute.recomputes("moe")
        if full and layout.recompute.method == "block":
            count = layout.preset.num_layers // layout.pp
            self.recompute = min(1.0, layout.recompute.num_layers / count)
            self.expert_recompute = self.recompute

    def bandwidth(self, span: int) -> float:
        """Bytes/s of a group whose ranks lie within so many consecutive ones."""
        return WITHIN_MACHINE if self.machines.holds(span) else BETWEEN_MACHINES

    def micro_batch(self, stage: int) -> dict[str, float]:
        """Forward and backward of one micro-batch on a pipeline rank, by field of StepTime."""
        layers = stage_layers(self.layout, stage)
        windowed = sum(self.layout.preset.is_windowed(layer) for layer in layers)
        full = len(layers) - windowed
        parts = {
            "attention": full * self.full_attention() + windowed * self.windowed_attention(),
            "expert_gemms": len(layers) * self.experts(),
            "dense_gemms": len(layers) * self.layer_gemms(),
            "memory_bound": len(layers) * self.layer_memory_bound(),
            "model_parallel_comm": len(layers) * self.layer_comm(),
        }
        if self.layout.pp > 1:
            hidden = 2 * self.sizes.residual * self.layout.preset.hidden_size
            parts["model_parallel_comm"] += 4 * hidden / self.bandwidth(self.layout.gpus)
        if stage == self.layout.pp - 1:
            gemms, memory_bound = self.head()
            parts["dense_gemms"] += gemms
            parts["memory_bound"] += memory_bound
        return parts

    def full_attention(self) -> float:
        """Attention without a window, of one layer."""
        layout, preset = self.layout, self.layout.preset
        length = layout.seq_length
        pairs = visible_pairs(length) * layout.micro_batch_size
        # 4 FLOPs per pair and column forward, 10 backward, as benchmarks/kernels/attention.py
        # counts.
        flops = 14 * pairs * preset.num_attention_heads * preset.head_dim
        seconds = flops / self.rates.attention(length, self.backend) / layout.tp / layout.cp
        if layout.cp > 1:
            seconds /= self.rates.context_parallel_efficiency(length, layout.kv_comm)
            if not self.machines.holds(layout.cp * layout.tp):
                # Keys and values of all other ranks, in the forward and again in the backward, and
                # their gradients.
                received = 2 * 2 * self.sizes.tokens * self.sizes.kv * (layout.cp - 1)
                seconds += 3 * received / BETWEEN_MACHINES
        return seconds * (1 + 2 / 7 * self.recompute)

    def windowed_attention(self) -> float:
        """Attention with a window, of one layer."""
        layout = self.layout
        seconds = self.rates.window(self.backend) * self.sizes.tokens * self.sizes.heads / 64
        if layout.cp > 1:
            seconds /= self.rates.halo_efficiency()
        return seconds * (1 + 2 / 7 * self.recompute)

    def experts(self) -> float:
        """Grouped GEMMs of one layer."""
        preset, sizes = self.layout.preset, self.sizes
        flops = 18 * sizes.received * preset.hidden_size * sizes.ffn
        rate = self.rates.experts(sizes.received, self.layout.recompute.recomputes("moe_act"))
        return flops / rate * (1 + self.expert_recompute / 3)

    def layer_gemms(self) -> float:
        """Linear layers of one layer outside experts."""
        dense, _ = layer_parameters(self.layout)
        flops = 6 * self.sizes.tokens * sum(dense.values())
        return flops / self.rates.dense_gemm(self.sizes.tokens) * (1 + self.recompute / 3)

    def layer_memory_bound(self) -> float:
        """Memory-bound kernels of one layer."""
        sizes, h, layout = self.sizes, self.layout.preset.hidden_size, self.layout
        forward = sizes.residual * HIDDEN * h + sizes.tokens * ROTARY * (sizes.q + 2 * sizes.kv)
        # Permute and unpermute, and the sort by local expert where tokens come from several ranks.
        sorts = layout.ep * layout.etp > 1 and layout.local_experts > 1
        forward += 2 * 4 * h * (sizes.sent + sizes.received * sorts)
        return forward * (3 + self.recompute) / self.rates.memory()

    def layer_comm(self) -> float:
        """Tensor and expert parallel communication of one layer."""
        layout, sizes, h = self.layout, self.sizes, self.layout.preset.hidden_size
        seconds = 0.0
        if layout.ep > 1:  # dispatch and combine, and their backward
            sent = 2 * sizes.sent * h * (layout.ep - 1) / layout.ep * layout.expert_load
            calls = 4 + 2 * self.expert_recompute
            seconds += calls * sent / self.bandwidth(layout.ep * layout.etp)
        if layout.etp > 1:
            gathered = 2 * sizes.received * h * (layout.etp - 1) / layout.etp
            seconds += (4 + 2 * self.expert_recompute) * gathered / self.bandwidth(layout.etp)
        if layout.tp > 1:  # gather and scatter around attention; the backward gathers once more
            gathered = 2 * sizes.tokens * h * (layout.tp - 1) / layout.tp
            seconds += (5 + 2 * self.recompute) * gathered / self.bandwidth(layout.tp)
        return seconds

    def head(self) -> tuple[float, float]:
        """GEMMs, and memory-bound kernels, of output layer and loss."""
        layout, sizes = self.layout, self.sizes
        vocab = layout.preset.vocab_size // layout.tp
        weight = vocab * layout.preset.hidden_size
        gemms = 6 * sizes.tokens * weight / self.rates.dense_gemm(sizes.tokens)
        size = (CHUNKED_LOGIT if layout.loss_chunk else LOGIT) * sizes.tokens * vocab
        if layout.loss_chunk:  # each chunk reads and writes the weight gradient
            size += 8 * weight * -(-sizes.tokens // layout.loss_chunk)
        return gemms, size / self.rates.memory()

    def data_parallel_comm(self) -> float:
        """Gradients and weights over the data parallel ranks; no overlap, or complete overlap."""
        layout = self.layout
        dense, expert = rank_parameters(layout, 0)
        seconds = 0.0
        for elements, ranks in ((dense, layout.dp * layout.cp), (expert, layout.expert_dp)):
            size = elements * (layout.grad_bytes + 2) * (ranks - 1) / ranks
            if not layout.distributed_optimizer:
                size = 2 * elements * layout.grad_bytes * (ranks - 1) / ranks
            # The ranks of either group are spread over all of a stage.
            span = layout.gpus // layout.pp if ranks > 1 else 1
            seconds += size / self.bandwidth(span)
        return 0.0 if layout.overlap else seconds

    def optimizer(self) -> float:
        """Clearing of gradients, norm, clipping and AdamW."""
        layout = self.layout
        dense, expert = rank_parameters(layout, 0)
        state = dense + expert
        if layout.distributed_optimizer:
            state = dense / (layout.dp * layout.cp) + expert / layout.expert_dp
        seconds = (CLEAR * (dense + expert)) / self.rates.memory()
        seconds += ADAM * state * (1 - layout.offload) / self.rates.memory()
        # On the CPU seven fp32 numbers are read or written. Copies of the fp32 gradient to the CPU
        # and of the bf16 weight back overlap with it.
        return seconds + layout.offload * state * max(6 / CPU_LINK, 28 / CPU_MEMORY)
