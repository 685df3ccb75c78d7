# Copyright (c) 2026, the megatron-core gptoss authors.

"""Memory of the fullest rank at the fullest moment of a step, in bytes of live tensors.

It is torch.cuda.max_memory_allocated that this foretells; what CUDA, NCCL and the allocator's
fragments take comes on top (`BESIDE_TENSORS`), and is what a card has beyond its name, or most of it
(an "80 GB" H100 has 84.9e9 bytes).
"""

from dataclasses import dataclass

from megatron.gpt_oss.planner.activations import HeadTensors, LayerTensors, MicroBatch
from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.parameters import rank_parameters, stage_layers

GB = 10**9
# What CUDA, NCCL and the allocator's fragments took at most: over four GPUs, on one or two
# (docs/planning.md).
BESIDE_TENSORS, BESIDE_TENSORS_OF_FEW = 8 * GB, 5 * GB
# Bytes of the cards that were measured, by the number in their name; H100 and H200. Others are taken
# at their number: a B200 of "192 GB" has less than that.
CARDS = {80: 84.9 * GB, 141: 150.1 * GB}
# Part of a machine's memory that the optimizer's tensors may take; assumed. Processes, data and the
# operating system have the rest.
HOST_SHARE = 0.9
# bf16 weight and, in fp32, master weight and two moments of AdamW.
WEIGHT, MASTER, MOMENTS = 2, 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters, gradients, optimizer: there all the time.
        moments: of what comes and goes, bytes at each moment of a step that may be the fullest.
        activations, logits, step: the most that layers, head and loss, and the optimizer's step
            take; not all at the same moment.
        host: of the optimizer on the host, not in the total.
        stage: the pipeline rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    moments: dict[str, int]
    activations: int
    logits: int
    step: int
    host: int
    stage: int

    @property
    def moment(self) -> str:
        """The fullest."""
        return max(self.moments, key=self.moments.get)

    @property
    def total(self) -> int:
        """On the GPU, at the fullest moment."""
        return self.parameters + self.gradients + self.optimizer + self.moments[self.moment]

    def as_dict(self) -> dict:
        """For JSON, in bytes."""
        return {**vars(self), "moment": self.moment, "total": self.total}


def fullest_rank(layout: Layout) -> Memory:
    """Of the pipeline rank that needs most: the first holds most micro-batches, the last the loss."""
    stages = {0, min(1, layout.pp - 1), layout.pp - 1}
    return max((stage_memory(layout, stage) for stage in sorted(stages)), key=lambda m: m.total)


def stage_memory(layout: Layout, stage: int) -> Memory:
    """Of a pipeline rank at its fullest moment."""
    dense, expert = rank_parameters(layout, stage)
    state, host, step = optimizer_memory(layout, dense, expert)
    buffers = gather_buffer(layout)
    moments = {
        name: (layers + buffers, logits)
        for name, (layers, logits) in StageMoments(layout, stage).all().items()
    }
    return Memory(
        parameters=WEIGHT * (dense + expert),
        gradients=layout.grad_bytes * (dense + expert),
        optimizer=state,
        moments={name: sum(parts) for name, parts in moments.items()}
        | {"optimizer's step": step + buffers},
        activations=max(layers for layers, _ in moments.values()),
        logits=max(logits for _, logits in moments.values()),
        step=step,
        host=host,
        stage=stage,
    )


def card_memory(gigabytes: float) -> float:
    """Bytes of a card by the number in its name."""
    return CARDS.get(gigabytes, gigabytes * GB)


def beside_tensors(gpus: int) -> int:
    """Bytes of a card that tensors do not get in a run on so many GPUs."""
    return BESIDE_TENSORS if gpus > 2 else BESIDE_TENSORS_OF_FEW


def host_memory(layout: Layout) -> int:
    """Bytes that the optimizer takes on the host for the rank that has most there."""
    if not layout.offload:
        return 0
    stages = {0, layout.pp - 1}
    return max(optimizer_memory(layout, *rank_parameters(layout, stage))[1] for stage in stages)


def optimizer_memory(layout: Layout, dense: int, expert: int) -> tuple[int, int, int]:
    """Bytes of master weights and moments on the GPU, on the host, and what a step takes besides.

    Args:
        dense, expert: elements on the rank.
    """
    if layout.distributed_optimizer:
        dense = -(-dense // (layout.dp * layout.cp))
        expert = -(-expert // layout.expert_dp)
    both = round((MASTER + MOMENTS) * (dense + expert) * layout.offload)
    here = (MASTER + MOMENTS) * (dense + expert) - both
    host = both + round(4 * (dense + expert) * layout.offload)  # and the gradients
    # AdamW is one kernel, and gradients are clipped in place; if they are not fp32, all of them are
    # copied first.
    step = 0 if layout.grad_bytes == 4 else round(4 * (dense + expert) * (1 - layout.offload))
    return here, host, step


def gather_buffer(layout: Layout) -> int:
    """The buffer into which sequence parallelism gathers a linear layer's input, which stays."""
    if not layout.sequence_parallel or layout.tp == 1:
        return 0
    return 2 * MicroBatch.of(layout).tokens * layout.preset.hidden_size


class StageMoments:
    """Bytes of layers and of the head, at the moments of a step that may be the fullest."""

    def __init__(self, layout: Layout, stage: int, device: str = "cuda"):
        self.layout, self.stage, self.device = layout, stage, device
        self.numbers = stage_layers(layout, stage)
        by_kind = {kind: LayerTensors(layout, kind, device) for kind in (True, False)}
        # Layers 0, 2, ... see a window.
        self.layers = [by_kind[number % 2 == 0] for number in self.numbers]
        self.sizes = self.layers[0].sizes
        self.head = HeadTensors(layout, device) if stage == layout.pp - 1 else None

    def kept(self) -> int:
        """Bytes that the layers of one micro-batch keep between forward and backward."""
        recompute = self.layout.recompute
        count = len(self.layers)
        h, preset = self.layout.preset.hidden_size, self.layout.preset
        angles = 4 * self.sizes.length * preset.head_dim  # of the positions, one tensor for all
        if recompute.granularity != "full":
            own = angles if self.device == "cuda" else 0  # the CPU keeps cosines and sines instead
            return own + sum(layer.kept() for layer in self.layers)
        inputs = 2 * self.sizes.residual * h
        if recompute.method == "block":
            again = min(recompute.num_layers, count)
            rest = sum(layer.everything() for layer in self.layers[again:])
            return again * inputs + angles + rest
        return -(-count // recompute.num_layers) * inputs + angles

    def in_flight(self) -> float:
        """Micro-batches (of all chunks of the rank) whose tensors are kept at the same time."""
        layout = self.layout
        pp, chunks = layout.pp, layout.virtual_stages
        if chunks == 1:
            return min(pp - self.stage, layout.microbatches)
        warm_up = (pp - self.stage - 1) * 2 + (chunks - 1) * pp + 1
        return min(warm_up, layout.microbatches * chunks) / chunks

    def all(self) -> dict[str, tuple[int, int]]:
        """(layers, head) in bytes by moment."""
        recompute, hidden = self.layout.recompute, self.layout.preset.hidden_size
        kept = self.kept()
        all_kept = round(kept * self.in_flight()) + 32 * self.sizes.tokens  # and the batch itself
        last, kept_by_last = self._last_layer()
        others = all_kept - kept_by_last
        again = recompute.makes_again("moe") or self._last_is_made_again()
        residual = 2 * self.sizes.residual * hidden
        moments = {}
        for name, size in last.forward_moments().items():
            if not again:
                moments[f"forward: {name}"] = (others + size, 0)
            else:  # while the gradient of its output waits
                size += self._made_with_last() + residual
                moments[f"made again: {name}"] = (others + size, 0)
        if self.head is not None:
            for name, size in self.head.logits().items():
                moments[name] = (all_kept + self.head.norm, size)
        for name, size in last.backward_moments().items():
            if again:  # the output, that autograd starts from
                size += self._made_with_last() + residual
            moments[f"backward: {name}"] = (others + size, 0)
        if self.stage == 0:
            vocabulary = self.layout.preset.vocab_size // self.layout.tp
            size = 2 * (vocabulary + self.sizes.tokens) * hidden
            moments["gradient of the embedding"] = (all_kept - kept + size, 0)
        return moments

    def _last_is_made_again(self) -> bool:
        """Whether full recomputation, which begins with the first layer, comes to the last."""
        recompute = self.layout.recompute
        if recompute.granularity != "full":
            return False
        return recompute.method != "block" or recompute.num_layers >= len(self.layers)

    def _last_layer(self) -> tuple[LayerTensors, int]:
        """The layer whose backward is first, and what it keeps by itself until then."""
        last = self.layers[-1]
        if self._last_is_made_again():
            return last, 0
        return last, last.kept()

    def _made_with_last(self) -> int:
        """What the layers made again together with the last one keep: uniform, several a unit."""
        recompute = self.layout.recompute
        if recompute.granularity != "full" or recompute.method == "block":
            return 0
        unit = min(recompute.num_layers, len(self.layers))
        return sum(layer.everything() for layer in self.layers[len(self.layers) - unit : -1])
