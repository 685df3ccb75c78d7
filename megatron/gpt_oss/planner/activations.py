# Copyright (c) 2026, the megatron-core gptoss authors.

"""The tensors of a micro-batch on one rank: what a layer and the head keep, what they use.

Bytes of bf16 training on the local path with experts in grouped products, as autograd keeps them:
a storage counts once, a parameter not at all. The names say which tensor it is. What a test
measures with saved_tensors_hooks on the CPU differs (`device`) in the norms, which PyTorch fuses on
CUDA, and in the rotation, which is a kernel of ours there.
"""

from dataclasses import dataclass, replace

from megatron.gpt_oss.planner.layout import Layout

# Bytes that the attention kernels take in their backward, dq, dk and dv included, for each element
# of the query: 33 KB for 4096 (cuDNN and FlashAttention 2; FlashAttention 4: 21 KB), from beyond_mib
# of benchmarks/results/attention_h100.json.
ATTENTION_BACKWARD = 8


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of one micro-batch on one rank.

    Attributes:
        length: tokens of a sequence on this rank, tokens: of all its sequences.
        residual: tokens between the modules, fewer with sequence parallelism.
        routed: tokens that this rank routes.
        sent: rows that it sends to experts, rows: that its experts get.
        q, kv: columns of query, and of key or value; heads: of the query.
        width: columns of an expert's activation.
    """

    length: int
    tokens: int
    residual: int
    routed: int
    sent: int
    rows: int
    q: int
    kv: int
    heads: int
    width: int

    @classmethod
    def of(cls, layout: Layout) -> "MicroBatch":
        preset, tp = layout.preset, layout.tp
        length = layout.seq_length // layout.cp
        tokens = length * layout.micro_batch_size
        routed = tokens // tp
        sent = routed * preset.num_experts_per_tok
        return cls(
            length=length,
            tokens=tokens,
            residual=routed if layout.sequence_parallel else tokens,
            routed=routed,
            sent=sent,
            rows=round(sent * layout.etp * (layout.expert_load if layout.ep > 1 else 1)),
            q=preset.num_attention_heads * preset.head_dim // tp,
            kv=preset.num_query_groups * preset.head_dim // tp,
            heads=preset.num_attention_heads // tp,
            width=preset.moe_ffn_hidden_size // layout.etp,
        )


class LayerTensors:
    """What one layer keeps between forward and backward, and the moments of both.

    Args:
        layout: of the run.
        windowed: whether the layer sees a window of keys.
        device: 'cuda' or 'cpu'.
    """

    def __init__(self, layout: Layout, windowed: bool, device: str = "cuda"):
        self.layout, self.windowed, self.device = layout, windowed, device
        sizes, parts = MicroBatch.of(layout), layout.mlp_chunks
        # Of one part of the sequence, where experts take it in parts.
        routed = {name: getattr(sizes, name) // parts for name in ("routed", "sent", "rows")}
        self.sizes = replace(sizes, **routed)
        self.hidden = layout.preset.hidden_size
        self.attention = self._attention()
        self.experts = self._experts()

    def everything(self) -> int:
        """Bytes of all that a layer has where nothing is made again, or while it is."""
        parts = 1 if self.layout.recompute.makes_again("moe") else self.layout.mlp_chunks
        return sum(self.attention.values()) + parts * sum(self.experts.values())

    def kept(self) -> int:
        """Bytes that stay, for the selective policies; full recomputation is the stage's."""
        recompute, parts = self.layout.recompute, self.layout.mlp_chunks
        kept = self.attention | {name: parts * size for name, size in self.experts.items()}
        if recompute.makes_again("moe"):
            kept = dict(self.attention)
        if recompute.makes_again("moe_act"):
            kept.pop("experts' activation", None)
        if recompute.makes_again("core_attn"):
            kept.pop("lse")
        if recompute.makes_again("layernorm"):
            kept = {name: size for name, size in kept.items() if "norm's output" not in name}
        return sum(kept.values())

    def _norm(self, name: str) -> dict[str, int]:
        tokens, h = self.sizes.residual, self.hidden
        if self.device == "cpu":  # decomposed: the input in fp32, and normalised, in fp32
            kept = {f"{name} norm's input": 4 * tokens * h, f"{name} normalised": 4 * tokens * h}
        else:
            kept = {f"{name} norm's input": 2 * tokens * h}
        return {**kept, f"{name} norm's rstd": 4 * tokens, f"{name} norm's output": 2 * tokens * h}

    def _attention(self) -> dict[str, int]:
        """Of both norms and the attention between them."""
        n, preset, layout = self.sizes, self.layout.preset, self.layout
        out = 2 * n.tokens * n.q
        kept = {
            **self._norm("input"),
            "query": out,
            "out": out,
            "lse": 4 * n.tokens * n.heads,
        }
        key = 2 * n.tokens * n.kv
        exchange = "halo" if self.windowed and layout.cp > 1 else layout.exchange
        if exchange == "halo":
            reach = 2 * min(preset.sliding_window - 1, n.length // 2) * layout.micro_batch_size
            kept["key, value with halo"] = 2 * 2 * (n.tokens + reach) * n.kv
            if layout.micro_batch_size > 1:  # two chunks, joined
                kept["out of both chunks"] = out
        elif exchange.startswith("a2a"):
            kept["key, value of this rank's heads"] = 2 * key * self._key_copies()
            kept["out in the order of tokens"] = out
        elif self.device == "cpu":
            kept["key"] = key
            kept["value, within query, key and value"] = out + 2 * key
        else:
            kept["key, value"] = 2 * key
        if self.device == "cpu":  # for query and key, whatever the micro-batch
            kept["cos and sin"] = 4 * n.length * preset.head_dim * 2
        return {**kept, **self._norm("experts'")}

    def _key_copies(self) -> int:
        """How often the all-to-all repeats key heads, so that each rank has those of its queries."""
        # Imports torch, which `gptoss --help` does not wait for.
        from megatron.core.transformer.sink_attention.context_parallel.ulysses import kv_copies

        head_dim = self.layout.preset.head_dim
        return kv_copies(self.sizes.heads, self.sizes.kv // head_dim, self.layout.cp)

    def _experts(self) -> dict[str, int]:
        """Router, dispatch, experts."""
        n, preset = self.sizes, self.layout.preset
        kept = {
            "router's choice": (8 + 4) * n.sent,
            # A slice of the sorted (expert, token) pairs, of which all stay.
            "order of all pairs": 8 * n.routed * preset.num_experts,
            "token of each row": 8 * n.sent,
            "experts' rows": 2 * n.rows * self.hidden,
            "gate and up": 2 * n.rows * 2 * n.width,
            "experts' activation": 2 * n.rows * n.width,
            "rows' weights": 4 * n.rows,
        }
        if self.layout.tp > 1 and not self.layout.sequence_parallel:
            kept["this rank's tokens"] = 2 * n.routed * self.hidden
        return kept

    # The moments. Each is the sum of all that is alive of this layer.

    def forward_moments(self) -> dict[str, int]:
        """While the experts' answer comes back; Python's frames hold the rows on their way."""
        n, h, layout = self.sizes, self.hidden, self.layout
        several = layout.ep * layout.etp > 1
        sorts = several and layout.local_experts > 1
        sent, rows = 2 * n.sent * h, 2 * n.rows * h
        # Permuted tokens, and what the all-to-all brought, unless they are the experts' rows.
        held = 0
        if several:
            held += sent
            if layout.ep > 1 and (sorts or layout.etp > 1):
                held += rows // layout.etp
        alive = self.everything()
        without = alive
        if layout.recompute.makes_again("moe_act"):
            without -= self.experts["experts' activation"]
        back = rows if sorts else 0
        combined = sent if layout.ep > 1 else 0
        return {
            "experts": alive + held + rows,
            "experts' answer": without + held + rows + back + (sent if layout.etp > 1 else 0),
            "answer to the tokens": without
            + held
            + max(back + combined, rows if not several else sent)
            + 2 * n.routed * h,
        }

    def backward_moments(self) -> dict[str, int]:
        """The experts' backward, operation by operation, then attention's.

        The gradient that comes in stays throughout: it is the residual's too.
        """
        n, h, layout = self.sizes, self.hidden, self.layout
        residual = 2 * n.residual * h
        rows, gate_up = 2 * n.rows * h, 2 * n.rows * 2 * n.width
        activation = 2 * n.rows * n.width
        fc1 = 2 * layout.local_experts * h * 2 * n.width
        fc2 = fc1 // 2
        # fp32 sums of 32 rows for the first bias, of 64 for the second.
        first, second = (4 * (n.rows // tile + layout.local_experts) for tile in (32, 64))
        alive = self.everything()
        after_fc2 = alive - activation
        after_swiglu = after_fc2 - gate_up
        attention = sum(self.attention.values())
        qkv = 2 * n.tokens * (n.q + 2 * n.kv)
        return {
            "experts' answer": alive + residual + rows + max(rows, 2 * n.sent * h),
            "experts' second product": alive + residual + rows + max(activation + fc2, second * h),
            "experts' activation": after_fc2
            + residual
            + activation
            + gate_up
            + first * 2 * n.width,
            "experts' first product": after_swiglu + residual + gate_up + rows + fc1,
            "attention": attention + residual + n.tokens * n.q * (2 + ATTENTION_BACKWARD) + qkv,
        }


class HeadTensors:
    """The last norm, the logits and the loss of one micro-batch."""

    def __init__(self, layout: Layout, device: str = "cuda"):
        self.layout = layout
        n, preset = MicroBatch.of(layout), layout.preset
        self.tokens, h = n.tokens, preset.hidden_size
        self.rows = preset.vocab_size // layout.tp  # of the vocabulary
        self.weight = self.rows * h
        norm = LayerTensors(layout, False, device)._norm("final")
        self.norm = sum(norm.values())
        self.hidden = 2 * n.residual * h
        self.chunk = min(layout.loss_chunk, n.tokens)

    def kept(self) -> int:
        """Between forward and backward."""
        if not self.chunk:
            return self.norm + self.tokens * (4 * self.rows + 1 + 8)
        # The gradient of the norm's output in the place of the output, and the weight's in fp32
        # where it is not in DDP's buffer already.
        return self.norm + 4 * self._own_gradient() + 4 * self.tokens

    def _own_gradient(self) -> int:
        """Elements of the weight's gradient that is kept beside DDP's buffer, which is not fp32."""
        return 0 if self.layout.grad_bytes == 4 else self.weight

    def logits(self) -> dict[str, int]:
        """All that is alive of the head, its norm left out, at the moments of the loss."""
        if not self.chunk:
            # bf16, and fp32 that the softmax and its gradient overwrite; then the gradient in bf16
            # and the weight's.
            return {
                "loss": 6 * self.tokens * self.rows,
                "gradient of the loss": 6 * self.tokens * self.rows,
                "gradient of the head": 2 * self.tokens * self.rows + 2 * self.weight + self.hidden,
            }
        # The logits of a chunk, which their gradient overwrites, and that of its hidden states. What
        # autograd gets for the weight is a tensor of its size in any case.
        own = 4 * self._own_gradient()
        chunk = 2 * self.chunk * (self.rows + self.layout.preset.hidden_size)
        return {
            "loss": self.hidden + own + chunk,
            "gradient of the head": self.hidden + own + 2 * self.weight,
        }
