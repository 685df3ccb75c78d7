# Copyright (c) 2026, the megatron-core gptoss authors.

"""The time of a step on paper: FLOPs and bytes by the rates that were measured (rates.json).

What was not measured is assumed, and is here by name. The kernels' launches, the host and the
data are not in it: a step takes at least this long.
"""

from dataclasses import dataclass

from megatron.gpt_oss.planner.activations import MicroBatch
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.machines import Machines
from megatron.gpt_oss.planner.parameters import layer_parameters, rank_parameters, stage_layers
from megatron.gpt_oss.planner.rates import Rates

# Assumed, bytes/s a GPU and direction: 450e9 of NVLink 4 and 50e9 of a 400 Gb/s adapter, with what
# collectives commonly reach of them; half of PCIe 5 x16.
WITHIN_MACHINE = 300e9
BETWEEN_MACHINES = 40e9
HOST_LINK = 25e9
# A rank's share of the host's memory: 54e9 by benchmarks/results/whole_model_two_h200x2.json, two
# ranks on a host of four GPUs.
HOST_MEMORY = 50e9

# Passes over memory, counted in the code. Bytes of an element of the optimizer's state (AdamW's
# kernel 28, norm 4, clipping 8, weight 6), and to clear a gradient.
ADAM, CLEAR = 46, 4
# Bytes a logit. All at once: product's output 2, to fp32 6, maximum 4, subtraction 8, exponential 8,
# sum 4, division 8, gradient 8, to bf16 6, its two reads 4. In chunks: product 2, two kernels 2 and
# 4, two reads 4.
LOGIT, CHUNKED_LOGIT = 58, 12
# Bytes for each hidden element of a token and layer, forward: two norms 8, two residuals with bias
# 12; the backward takes twice as many. For each of query, key and value: bias 4, rotation 4.
TOKEN, ROTARY = 20, 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by what they are spent on.

    Attributes:
        attention, experts, products (other than the experts', the head's included), passes (over
            memory), exchange (tensor, expert and pipeline parallel), bubble, reduction (data
            parallel), optimizer.
    """

    attention: float
    experts: float
    products: float
    passes: float
    exchange: float
    bubble: float
    reduction: float
    optimizer: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(vars(self).values())


def step_time(
    layout: Layout,
    rates: Rates | None = None,
    backend: str = "cudnn",
    machines: Machines | None = None,
) -> StepTime:
    """The time of a step.

    Args:
        layout: of the run.
        rates: measured ones.
        backend: of attention, one of rates.json.
        machines: whose GPUs NVLink joins; of eight by default.
    """
    machines = machines or Machines.guessed(layout.gpus)
    clock = _Clock(layout, rates or Rates(), backend, machines)
    stages = [clock.micro_batch(stage) for stage in range(layout.pp)]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    all_stages = sum(sum(parts.values()) for parts in stages)
    # The first micro-batch goes through all stages, the others follow the slowest.
    bubble = (all_stages - sum(slowest.values())) / layout.virtual_stages
    spent = {name: seconds * layout.microbatches for name, seconds in slowest.items()}
    return StepTime(
        **spent, bubble=bubble, reduction=clock.reduction(), optimizer=clock.optimizer()
    )


class _Clock:
    def __init__(self, layout: Layout, rates: Rates, backend: str, machines: Machines):
        self.layout, self.rates, self.backend = layout, rates, backend
        self.machines = machines
        self.sizes = MicroBatch.of(layout)
        # A forward made again is a third of the products' time, 2 of attention's 7.
        full = layout.recompute.granularity == "full"
        self.again = full
        self.experts_again = full or layout.recompute.makes_again("moe")
        if full and layout.recompute.method == "block":
            count = layout.preset.num_layers // layout.pp
            self.again = min(1.0, layout.recompute.num_layers / count)
            self.experts_again = self.again

    def link(self, span: int) -> float:
        """Bytes/s within a group whose ranks lie in so many consecutive ones."""
        return WITHIN_MACHINE if self.machines.holds(span) else BETWEEN_MACHINES

    def micro_batch(self, stage: int) -> dict[str, float]:
        """Seconds of forward and backward of one micro-batch on a pipeline rank."""
        numbers = stage_layers(self.layout, stage)
        full = sum(number % 2 for number in numbers)
        parts = {
            "attention": full * self.full_attention() + (len(numbers) - full) * self.window(),
            "experts": len(numbers) * self.experts(),
            "products": len(numbers) * self.layer_products(),
            "passes": len(numbers) * self.passes(),
            "exchange": len(numbers) * self.exchange(),
        }
        if self.layout.pp > 1:
            hidden = 2 * self.sizes.residual * self.layout.preset.hidden_size
            parts["exchange"] += 4 * hidden / self.link(self.layout.gpus)
        if stage == self.layout.pp - 1:
            head, passes = self.head()
            parts["products"] += head
            parts["passes"] += passes
        return parts

    def full_attention(self) -> float:
        layout, preset = self.layout, self.layout.preset
        length = layout.seq_length
        pairs = length * (length + 1) / 2 * layout.micro_batch_size
        # 4 FLOPs a pair and column forward, 10 backward, as the benchmark counts them.
        flops = 14 * pairs * preset.num_attention_heads * preset.head_dim
        seconds = flops / self.rates.attention(length, self.backend) / layout.tp / layout.cp
        if layout.cp > 1:
            seconds /= self.rates.split_attention(length, layout.exchange)
            if not self.machines.holds(layout.cp * layout.tp):
                # Keys and values from all other ranks, and again and their gradients.
                received = 2 * 2 * self.sizes.tokens * self.sizes.kv * (layout.cp - 1)
                seconds += 3 * received / BETWEEN_MACHINES
        return seconds * (1 + 2 / 7 * self.again)

    def window(self) -> float:
        layout = self.layout
        seconds = self.rates.window(self.backend) * self.sizes.tokens * self.sizes.heads / 64
        if layout.cp > 1:
            seconds /= self.rates.window_split()
        return seconds * (1 + 2 / 7 * self.again)

    def experts(self) -> float:
        preset, sizes = self.layout.preset, self.sizes
        flops = 18 * sizes.rows * preset.hidden_size * sizes.width
        rate = self.rates.experts(sizes.rows, self.layout.recompute.makes_again("moe_act"))
        return flops / rate * (1 + self.experts_again / 3)

    def layer_products(self) -> float:
        dense, _ = layer_parameters(self.layout)
        flops = 6 * self.sizes.tokens * sum(dense.values())
        return flops / self.rates.product(self.sizes.tokens) * (1 + self.again / 3)

    def passes(self) -> float:
        sizes, h, layout = self.sizes, self.layout.preset.hidden_size, self.layout
        forward = sizes.residual * TOKEN * h + sizes.tokens * ROTARY * (sizes.q + 2 * sizes.kv)
        # To the rows and back, and where rows come from several ranks, their sort and back.
        sorts = layout.ep * layout.etp > 1 and layout.local_experts > 1
        forward += 2 * 4 * h * (sizes.sent + sizes.rows * sorts)
        return forward * (3 + self.again) / self.rates.memory()

    def exchange(self) -> float:
        layout, sizes, h = self.layout, self.sizes, self.layout.preset.hidden_size
        seconds = 0.0
        if layout.ep > 1:  # there and back, and the gradients
            sent = 2 * sizes.sent * h * (layout.ep - 1) / layout.ep * layout.expert_load
            trips = 4 + 2 * self.experts_again
            seconds += trips * sent / self.link(layout.ep * layout.etp)
        if layout.etp > 1:
            gathered = 2 * sizes.rows * h * (layout.etp - 1) / layout.etp
            seconds += (4 + 2 * self.experts_again) * gathered / self.link(layout.etp)
        if layout.tp > 1:  # gather and scatter around attention; the backward gathers once more
            gathered = 2 * sizes.tokens * h * (layout.tp - 1) / layout.tp
            seconds += (5 + 2 * self.again) * gathered / self.link(layout.tp)
        return seconds

    def head(self) -> tuple[float, float]:
        """Products and passes."""
        layout, sizes = self.layout, self.sizes
        rows = layout.preset.vocab_size // layout.tp
        weight = rows * layout.preset.hidden_size
        products = 6 * sizes.tokens * weight / self.rates.product(sizes.tokens)
        size = (CHUNKED_LOGIT if layout.loss_chunk else LOGIT) * sizes.tokens * rows
        if layout.loss_chunk:  # the gradient of the weight is read and written for each chunk
            size += 8 * weight * -(-sizes.tokens // layout.loss_chunk)
        return products, size / self.rates.memory()

    def reduction(self) -> float:
        """Of gradients and weights over the data parallel ranks, nothing hidden."""
        layout = self.layout
        dense, expert = rank_parameters(layout, 0)
        seconds = 0.0
        for elements, ranks in ((dense, layout.dp * layout.cp), (expert, layout.expert_dp)):
            size = elements * (layout.grad_bytes + 2) * (ranks - 1) / ranks
            if not layout.distributed_optimizer:
                size = 2 * elements * layout.grad_bytes * (ranks - 1) / ranks
            # The ranks of either group are spread over all of a stage.
            span = layout.gpus // layout.pp if ranks > 1 else 1
            seconds += size / self.link(span)
        return 0.0 if layout.overlap else seconds

    def optimizer(self) -> float:
        layout = self.layout
        dense, expert = rank_parameters(layout, 0)
        state = dense + expert
        if layout.distributed_optimizer:
            state = dense / (layout.dp * layout.cp) + expert / layout.expert_dp
        seconds = (CLEAR * (dense + expert)) / self.rates.memory()
        seconds += ADAM * state * (1 - layout.offload) / self.rates.memory()
        # Seven fp32 numbers read or written on the host; beside it, the gradient there in fp32 and the
        # weight back in bf16.
        return seconds + layout.offload * state * max(6 / HOST_LINK, 28 / HOST_MEMORY)
