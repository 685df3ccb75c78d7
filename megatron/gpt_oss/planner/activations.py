# Copyright (c) 2026, the megatron-core gptoss authors.

"""Activation memory of one micro-batch on one rank, in bytes of bf16 training.

Counts what autograd saves on the local path with grouped GEMMs: each storage once, no parameters.
The tests measure the same with saved_tensors_hooks on the CPU. With device='cpu' the sizes are
those of the CPU, where PyTorch decomposes RMSNorm and the rotation is not our fused kernel.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.gpt_oss.planner.layout import Layout
from megatron.gpt_oss.planner.rates import Rates

FP8_SEGMENT = 256


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of one micro-batch on one rank.

    Attributes:
        length: tokens of a sequence on this rank.
        tokens: tokens of all sequences of the micro-batch on this rank.
        residual: tokens between the modules, fewer with sequence parallelism.
        router_tokens: tokens that this rank routes.
        sent: routed tokens that this rank dispatches.
        received: routed tokens of the local experts.
        q, kv: columns of query, and of key or value.
        heads: query heads.
        ffn: columns of an expert's activation.
        padded: `received` with each expert's tokens padded for FP8's wgrad, at most.
    """

    length: int
    tokens: int
    residual: int
    router_tokens: int
    sent: int
    received: int
    q: int
    kv: int
    heads: int
    ffn: int
    padded: int

    @classmethod
    def from_layout(cls, layout: Layout) -> "MicroBatch":
        preset, tp = layout.preset, layout.tp
        length = layout.seq_length // layout.cp
        tokens = length * layout.micro_batch_size
        router_tokens = tokens // tp
        sent = router_tokens * preset.num_experts_per_tok
        received = round(sent * layout.etp * (layout.expert_load if layout.ep > 1 else 1))
        return cls(
            length=length,
            tokens=tokens,
            residual=router_tokens if layout.sequence_parallel else tokens,
            router_tokens=router_tokens,
            sent=sent,
            received=received,
            q=preset.num_attention_heads * preset.head_dim // tp,
            kv=preset.num_query_groups * preset.head_dim // tp,
            heads=preset.num_attention_heads // tp,
            ffn=preset.moe_ffn_hidden_size // layout.etp,
            padded=_padded(received, layout),
        )


def _padded(received: int, layout: Layout) -> int:
    """As `megatron.core.float8.quantize.padded_tokens`, without importing torch."""
    return (-(-received // FP8_SEGMENT) + layout.local_experts) * FP8_SEGMENT


class _Bytes:
    """Base of the dataclasses whose fields are sizes in bytes, or nested ones."""

    def total(self) -> int:
        """The sum of all fields."""
        parts = vars(self).values()
        return sum(part.total() if isinstance(part, _Bytes) else part for part in parts)


@dataclass(frozen=True)
class NormActivations(_Bytes):
    """Saved by one RMSNorm; `normalized` is the second fp32 copy of the decomposed norm (CPU)."""

    input: int
    normalized: int
    rstd: int
    output: int


@dataclass(frozen=True)
class AttentionActivations(_Bytes):
    """Saved by both norms of a layer and by the attention between them.

    Attributes:
        key_value: with context parallelism, after communication.
        rearranged_out: copy of core_attn_out: both chunks joined, or the order of tokens restored
            after an all-to-all.
        rotary_cos_sin: CPU only.
    """

    input_layernorm: NormActivations
    query: int
    core_attn_out: int
    lse: int
    key_value: int
    rearranged_out: int
    rotary_cos_sin: int
    pre_mlp_layernorm: NormActivations


@dataclass(frozen=True)
class ExpertActivations(_Bytes):
    """Saved by router, dispatcher and experts.

    Attributes:
        topk: indices (int64) and probabilities (fp32) of the router.
        sorted_indices: all sorted (expert, token) pairs; permuted_indices is a slice of them.
        router_input: this rank's tokens, where tensor parallelism splits them only here.
    """

    topk: int
    sorted_indices: int
    permuted_indices: int
    dispatched_input: int
    fc1_output: int
    fc2_input: int
    permuted_probs: int
    router_input: int


@dataclass(frozen=True)
class ForwardPhases(_Bytes):
    """Live bytes of a layer while the experts compute and their output returns to the tokens."""

    experts: int
    combine: int
    unpermute: int


@dataclass(frozen=True)
class BackwardPhases(_Bytes):
    """Live bytes of a layer during the backward of each operation, in this order."""

    combine: int
    linear_fc2: int
    activation: int
    linear_fc1: int
    attention: int


@dataclass(frozen=True)
class HeadPhases(_Bytes):
    """Live bytes of output layer and loss; loss_grad is None if the loss is chunked."""

    loss: int
    loss_grad: int | None
    output_layer_grad: int


class LayerActivations:
    """Tensors that one layer saves, and its live bytes during forward and backward.

    Args:
        windowed: whether the layer has a sliding window.
        device: 'cuda' or 'cpu'.
    """

    def __init__(self, layout: Layout, windowed: bool, device: str = "cuda"):
        self.layout, self.windowed, self.device = layout, windowed, device
        sizes, chunks = MicroBatch.from_layout(layout), layout.mlp_chunks
        # The experts run on one chunk of the routed tokens at a time.
        self.sizes = replace(
            sizes,
            router_tokens=sizes.router_tokens // chunks,
            sent=sizes.sent // chunks,
            received=sizes.received // chunks,
            padded=_padded(sizes.received // chunks, layout),
        )
        self.hidden = layout.preset.hidden_size
        self.attention = self._attention()
        self.experts = self._experts()

    @cached_property
    def all_saved(self) -> int:
        """Bytes of all saved tensors: without recomputation, or during it."""
        chunks = 1 if self.layout.recompute.recomputes("moe") else self.layout.mlp_chunks
        return self.attention.total() + chunks * self.experts.total()

    @cached_property
    def saved(self) -> int:
        """Bytes saved until the backward with selective recomputation."""
        recompute = self.layout.recompute
        attention, experts = self.attention, self.experts
        if recompute.recomputes("core_attn"):
            attention = replace(attention, lse=0)
        if recompute.recomputes("layernorm"):
            attention = replace(
                attention,
                input_layernorm=replace(attention.input_layernorm, output=0),
                pre_mlp_layernorm=replace(attention.pre_mlp_layernorm, output=0),
            )
        if recompute.recomputes("moe"):
            return attention.total()
        if recompute.recomputes("moe_act"):
            experts = replace(experts, fc2_input=0)
        return attention.total() + self.layout.mlp_chunks * experts.total()

    def norm(self) -> NormActivations:
        """Saved by one RMSNorm of the model."""
        tokens, h = self.sizes.residual, self.hidden
        on_cpu = self.device == "cpu"
        return NormActivations(
            input=(4 if on_cpu else 2) * tokens * h,
            normalized=4 * tokens * h if on_cpu else 0,
            rstd=4 * tokens,
            output=2 * tokens * h,
        )

    def _attention(self) -> AttentionActivations:
        n = self.sizes
        key_value, rearranged_out = self._key_value()
        head_dim = self.layout.preset.head_dim
        return AttentionActivations(
            input_layernorm=self.norm(),
            query=2 * n.tokens * n.q,
            core_attn_out=2 * n.tokens * n.q,
            lse=4 * n.tokens * n.heads,
            key_value=key_value,
            rearranged_out=rearranged_out,
            # On the CPU for query and key, whatever the micro-batch.
            rotary_cos_sin=4 * n.length * head_dim * 2 if self.device == "cpu" else 0,
            pre_mlp_layernorm=self.norm(),
        )

    def _key_value(self) -> tuple[int, int]:
        """Bytes of key and value, and of a rearranged copy of the attention output."""
        n, layout = self.sizes, self.layout
        key, out = 2 * n.tokens * n.kv, 2 * n.tokens * n.q
        comm = "halo" if self.windowed and layout.cp > 1 else layout.kv_comm
        if comm == "halo":
            window = layout.preset.sliding_window
            halo = 2 * min(window - 1, n.length // 2) * layout.micro_batch_size
            # The outputs of the two chunks are joined where they are not contiguous.
            joined = out if layout.micro_batch_size > 1 else 0
            return 2 * 2 * (n.tokens + halo) * n.kv, joined
        if comm.startswith("a2a"):
            return 2 * key * self._kv_copies(), out
        if self.device == "cpu":  # value is a view of the output of linear_qkv
            return key + out + 2 * key, 0
        return 2 * key, 0

    def _kv_copies(self) -> int:
        """How often the all-to-all repeats key heads: each rank needs those of its queries."""
        # Imports torch, which `gptoss --help` does not wait for.
        from megatron.core.transformer.sink_attention.context_parallel.ulysses import kv_copies

        head_dim = self.layout.preset.head_dim
        return kv_copies(self.sizes.heads, self.sizes.kv // head_dim, self.layout.cp)

    def _experts(self) -> ExpertActivations:
        n, layout = self.sizes, self.layout
        splits_tokens = layout.tp > 1 and not layout.sequence_parallel
        fp8 = layout.expert_fp8
        return ExpertActivations(
            topk=(8 + 4) * n.sent,
            sorted_indices=8 * n.router_tokens * layout.preset.num_experts,
            permuted_indices=8 * n.sent,
            # FP8: transposed, in e4m3; the activation's output is recomputed.
            dispatched_input=(n.padded if fp8 else 2 * n.received) * self.hidden,
            fc1_output=2 * n.received * 2 * n.ffn,
            fc2_input=0 if fp8 else 2 * n.received * n.ffn,
            permuted_probs=4 * n.received,
            router_input=2 * n.router_tokens * self.hidden if splits_tokens else 0,
        )

    def forward_phases(self) -> ForwardPhases:
        """Live bytes in the forward; Python frames hold the dispatched tokens until it ends."""
        n, h, layout = self.sizes, self.hidden, self.layout
        distributed = layout.ep * layout.etp > 1
        sorts = distributed and layout.local_experts > 1
        sent, received = 2 * n.sent * h, 2 * n.received * h
        # Permuted tokens, and the all-to-all's output unless it is the experts' input itself.
        dispatch = 0
        if distributed:
            dispatch += sent
            if layout.ep > 1 and (sorts or layout.etp > 1):
                dispatch += received // layout.etp
        saved = self.all_saved
        if layout.expert_fp8:  # nothing saves the bf16 tokens, a Python frame holds them
            dispatch += received
        fc2_input = n.received * n.ffn if layout.expert_fp8 else 0  # e4m3, not saved
        after_experts = saved
        if layout.recompute.recomputes("moe_act"):
            after_experts -= self.experts.fc2_input
        unsorted = received if sorts else 0
        returned = sent if layout.ep > 1 else 0
        return ForwardPhases(
            experts=saved + dispatch + received + fc2_input,
            combine=after_experts
            + dispatch
            + received
            + unsorted
            + (sent if layout.etp > 1 else 0),
            unpermute=after_experts
            + dispatch
            + max(unsorted + returned, sent if distributed else received)
            + 2 * n.router_tokens * h,
        )

    def backward_phases(self) -> BackwardPhases:
        """Live bytes in the backward.

        The output gradient stays throughout: it is the residual's too.
        """
        n, h, layout = self.sizes, self.hidden, self.layout
        output_grad = 2 * n.residual * h
        received, fc1_output = 2 * n.received * h, 2 * n.received * 2 * n.ffn
        fc2_input = 2 * n.received * n.ffn
        fc1_weight = 2 * layout.local_experts * h * 2 * n.ffn
        fc2_weight = fc1_weight // 2
        # fp32 partial sums of 32 tokens for the bias of fc1, of 64 for that of fc2.
        fc1_sums, fc2_sums = (4 * (n.received // tile + layout.local_experts) for tile in (32, 64))
        saved = self.all_saved
        after_fc2 = saved - fc2_input
        after_activation = after_fc2 - fc1_output
        qkv = 2 * n.tokens * (n.q + 2 * n.kv)
        attention_backward = Rates().attention_backward_bytes() * n.tokens * n.q
        expert_phases = (
            self._fp8_backward()
            if self.layout.expert_fp8
            else dict(
                linear_fc2=saved
                + output_grad
                + received
                + max(fc2_input + fc2_weight, fc2_sums * h),
                activation=after_fc2 + output_grad + fc2_input + fc1_output + fc1_sums * 2 * n.ffn,
                linear_fc1=after_activation + output_grad + fc1_output + received + fc1_weight,
            )
        )
        return BackwardPhases(
            **expert_phases,
            combine=saved + output_grad + received + max(received, 2 * n.sent * h),
            attention=self.attention.total()
            + output_grad
            + 2 * n.tokens * n.q
            + attention_backward
            + qkv,
        )

    def _fp8_backward(self) -> dict[str, int]:
        """Live bytes in the backward of FP8 experts, one autograd function that frees nothing saved.

        See `grouped_mlp.experts_fp8`: rows and transposed copies in e4m3, weight gradients in bf16.
        """
        n, h, layout = self.sizes, self.hidden, self.layout
        held = self.all_saved + 2 * n.residual * h + 2 * n.received * h  # output gradient, dout
        dout_t, dy, dy_t, h_t = (
            h * n.padded,
            2 * n.ffn * n.received,
            2 * n.ffn * n.padded,
            n.ffn * n.padded,
        )
        dh = 2 * n.received * n.ffn
        dx = 2 * n.received * h
        fc1_weight = 2 * layout.local_experts * h * 2 * n.ffn
        fc2_weight = fc1_weight // 2
        dout_sums = 4 * (n.received // 32 + layout.local_experts) * h
        dy_sums = 4 * (n.padded // FP8_SEGMENT * 2 * n.ffn + n.received * (n.ffn // 128 + 1))
        return dict(
            linear_fc2=held + h * n.received + max(dout_sums, dh + dout_t),
            activation=held + dout_t + dy + dy_t + h_t + max(dh + dy_sums, fc2_weight),
            linear_fc1=held + dy_t + dx + fc2_weight + max(dy, fc1_weight),
        )


class HeadActivations:
    """Final norm, output layer and loss of one micro-batch."""

    def __init__(self, layout: Layout, device: str = "cuda"):
        self.layout = layout
        n, preset = MicroBatch.from_layout(layout), layout.preset
        self.tokens = n.tokens
        self.vocab = preset.vocab_size // layout.tp
        self.weight = self.vocab * preset.hidden_size
        self.norm = LayerActivations(layout, False, device).norm().total()
        self.hidden = 2 * n.residual * preset.hidden_size
        self.chunk = min(layout.loss_chunk, n.tokens)

    @cached_property
    def saved(self) -> int:
        """Bytes saved until the backward."""
        if not self.chunk:
            return self.norm + self.tokens * (4 * self.vocab + 1 + 8)
        # The gradient of the norm's output replaces that output.
        return self.norm + self._weight_grad() + 4 * self.tokens

    def _weight_grad(self) -> int:
        """Bytes of an fp32 weight gradient in addition to DDP's buffer, if that is not fp32."""
        return 0 if self.layout.grad_bytes == 4 else 4 * self.weight

    def phases(self) -> HeadPhases:
        """Live bytes without those of the final norm."""
        if not self.chunk:
            # Logits in bf16 and in fp32; softmax and its gradient overwrite the fp32 logits.
            logits = 6 * self.tokens * self.vocab
            grads = 2 * self.tokens * self.vocab + 2 * self.weight + self.hidden
            return HeadPhases(loss=logits, loss_grad=logits, output_layer_grad=grads)
        # The gradient overwrites the logits of a chunk. Autograd gets a tensor of the weight's size
        # in any case.
        base = self.hidden + self._weight_grad()
        chunk = 2 * self.chunk * (self.vocab + self.layout.preset.hidden_size)
        return HeadPhases(
            loss=base + chunk, loss_grad=None, output_layer_grad=base + 2 * self.weight
        )
