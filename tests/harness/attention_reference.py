# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention with sinks from its definition, and the examples of the tests.

The reference builds the scores of one document and one head, appends the sink as a column, takes
the softmax over all columns and drops that of the sink. Autograd gives the gradients. It uses none
of the formulas under test. `window` is Hugging Face's sliding_window: 128 is window_size (127, 0).
"""

import dataclasses

import torch


def attention_ref(q, k, v, sink=None, scale=None, window=None, cu_q=None, cu_k=None):
    """q [s, b, np, hn] or packed [t, np, hn]; returns the same shape, in q's dtype.

    sink is [np], or one for every row, [s, b, np] or [t, np]: its gradient then are the terms that
    the gradient of [np] is the sum of.
    """
    if q.dim() == 4:
        if sink is not None:
            sink = sink.expand(q.shape[:3])
        columns = [
            attention_ref(
                q[:, i], k[:, i], v[:, i], None if sink is None else sink[:, i], scale, window
            )
            for i in range(q.shape[1])
        ]
        return torch.stack(columns, dim=1)
    if sink is not None:
        sink = sink.to(q.dtype).expand(q.shape[:2])
    cu_q = [0, q.shape[0]] if cu_q is None else cu_q
    cu_k = ([0, k.shape[0]] if len(cu_q) == 2 else cu_q) if cu_k is None else cu_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    documents = []
    for index in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
        position = torch.arange(num_q, device=q.device)[:, None] + num_k - num_q
        distance = position - torch.arange(num_k, device=q.device)[None, :]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        heads = []
        for head in range(q.shape[1]):
            scores = scale * q[rows, head] @ k[keys, head // group].T
            scores = scores.masked_fill(hidden, -torch.inf)
            if sink is not None:
                probs = torch.cat([scores, sink[rows, head, None]], dim=1).softmax(dim=1)[:, :-1]
            elif hidden.all(dim=1).any():
                probs = scores.softmax(dim=1).masked_fill(hidden, 0.0)
            else:
                probs = scores.softmax(dim=1)
            heads.append(probs @ v[keys, head // group])
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents)


def gradients(out, inputs, dout):
    """Gradients of out in the order of inputs, zeros for what it does not depend on."""
    grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)]


def window_size(window):
    """(left, right) of Hugging Face's sliding_window."""
    return None if window is None else (window - 1, 0)


@dataclasses.dataclass
class Example:
    """One case: shapes, mask, and special values."""

    tokens: int = 0
    batch: int = 1
    cu: tuple | None = None
    heads: int = 8
    groups: int = 2
    dim: int = 64
    window: int | None = None
    scale: float | None = None
    sinks: tuple = (-8.0, 8.0)
    factor: float = 1.0
    fused_qkv: bool = False
    sink_dtype: torch.dtype = torch.float32
    # Without a sink the gradients are zero or nearly so: rounding is all that is left of them.
    one_hot: bool = False

    def tensors(self, dtype, device="cpu", seed=0):
        """q, k, v, sink, dout; leaves, but for slices of a fused qkv."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lead = (self.cu[-1],) if self.cu else (self.tokens, self.batch)
        per_group = self.heads // self.groups
        qkv = normal(*lead, self.groups, per_group + 2, self.dim)
        qkv[..., :-1, :] *= self.factor
        q = qkv[..., :per_group, :].flatten(-3, -2)
        parts = [q, qkv[..., -2, :], qkv[..., -1, :]]
        dout = normal(*lead, self.heads, self.dim)
        sink = torch.linspace(*self.sinks, self.heads, dtype=torch.float64)
        if self.fused_qkv:  # key and value as Megatron's split of the projection leaves them
            fused = qkv.to(device, dtype)
            parts[1:] = [fused[..., -2, :], fused[..., -1, :]]
        q, k, v = (x.to(device, dtype).detach().requires_grad_() for x in parts)
        if self.fused_qkv:
            assert not k.is_contiguous() and not v.is_contiguous()
        sink = sink.to(device, self.sink_dtype if dtype != torch.float64 else dtype)
        return q, k, v, sink.requires_grad_(), dout.to(device, dtype)

    def options(self, device="cpu"):
        """Keyword arguments of sink_attention."""
        options = dict(softmax_scale=self.scale, window_size=window_size(self.window))
        if self.cu:
            lengths = [b - a for a, b in zip(self.cu, self.cu[1:])]
            options["cu_seqlens"] = torch.tensor(self.cu, dtype=torch.int32, device=device)
            options["max_seqlen"] = max(lengths)
        return options

    def reference(self, q, k, v, sink, dout, sink_terms=False):
        """out and the gradients of q, k, v, sink in float64, by the definition.

        With sink_terms the last is a pair: the gradient of the sink, and the norm of its terms a
        head, which is what its rounding errors are in proportion to.
        """
        q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        if sink is not None:
            sink = sink.detach().double()
            inputs.append(sink.expand(q.shape[:-1]).clone().requires_grad_())
        out = attention_ref(
            *inputs[:3],
            inputs[3] if sink is not None else None,
            self.scale,
            self.window,
            None if self.cu is None else list(self.cu),
        )
        values = [out.detach(), *gradients(out, inputs, dout)]
        if sink is not None:
            terms = values[4].flatten(0, -2)
            values[4] = (terms.sum(0), terms.norm(dim=0)) if sink_terms else terms.sum(0)
        return values


# Short ones, for any device. A tile of the math backend is 32 rows at least.
SMALL = {
    "T1": Example(tokens=1, dim=16),
    "T7-B3": Example(tokens=7, batch=3, dim=16),
    "T70-B2-W1": Example(tokens=70, batch=2, dim=16, window=1, one_hot=True),
    "T63-W64-shorter": Example(tokens=63, dim=16, window=64),
    "T64-W64-equal": Example(tokens=64, dim=16, window=64),
    "T65-B2-W64-crossing": Example(tokens=65, batch=2, dim=16, window=64),
    "T97-W9-scale-2": Example(tokens=97, dim=16, window=9, scale=2.0),
    "T97-one-group-scale-0.01": Example(tokens=97, groups=1, dim=16, scale=0.01),
    "T33-large-sinks": Example(tokens=33, dim=16, sinks=(40.0, 80.0)),
    "T33-small-sinks": Example(tokens=33, dim=16, sinks=(-80.0, -40.0)),
    "T40-scores-1e4": Example(
        tokens=40, dim=16, factor=100.0, scale=0.1, sinks=(-1e4, 1e4), one_hot=True
    ),
    "T40-B2-fused-qkv": Example(tokens=40, batch=2, dim=16, fused_qkv=True),
    "T40-bf16-sinks": Example(tokens=40, dim=16, sink_dtype=torch.bfloat16),
    "packed": Example(cu=(0, 31, 32, 32, 73, 100), dim=16),
    "packed-W8": Example(cu=(0, 31, 32, 33, 73, 100), dim=16, window=8),
    "packed-one-token-documents": Example(cu=tuple(range(9)), dim=16, one_hot=True),
    "packed-fused-qkv-W40": Example(cu=(0, 17, 90), dim=16, window=40, fused_qkv=True),
}

# What a kernel for a GPU is made for.
LARGE = {
    "T300-B2-H8_2-D64-W128": Example(tokens=300, batch=2, window=128),
    "T127-D64-W128": Example(tokens=127, window=128),
    "T128-D64-W128": Example(tokens=128, window=128),
    "T129-D64-W128": Example(tokens=129, window=128),
    "T1001-D64": Example(tokens=1001),
    "T1001-H64_8-D64-bf16-sinks": Example(
        tokens=1001, heads=64, groups=8, sink_dtype=torch.bfloat16
    ),
    "T512-B2-D32": Example(tokens=512, batch=2, dim=32),
    "T512-D96": Example(tokens=512, dim=96),
    "T512-B2-D128-fused-qkv": Example(tokens=512, batch=2, dim=128, fused_qkv=True),
    "T300-D256": Example(tokens=300, dim=256),
    "T513-D64-W1": Example(tokens=513, window=1, one_hot=True),
    "T513-D64-scale-0.3-W200": Example(tokens=513, window=200, scale=0.3),
    "T513-D64-large-sinks": Example(tokens=513, sinks=(20.0, 30.0)),
    "T513-D64-small-sinks": Example(tokens=513, sinks=(-80.0, -40.0)),
    "T256-D64-scores-1e4": Example(
        tokens=256, factor=50.0, scale=0.5, sinks=(-1e4, 1e4), one_hot=True
    ),
    "packed-D64": Example(cu=(0, 97, 173, 174, 300, 812)),
    "packed-D64-W128": Example(cu=(0, 97, 173, 174, 300, 812), window=128),
    "packed-D64-one-token": Example(cu=(0, 1, 2, 3, 130)),
    "packed-H64_8-D64-fused-qkv": Example(
        cu=(0, 300, 301, 1000), heads=64, groups=8, fused_qkv=True
    ),
}
