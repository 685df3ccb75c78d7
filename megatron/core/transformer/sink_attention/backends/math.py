# Copyright (c) 2026, the megatron-core gptoss authors.

"""Attention in plain PyTorch: any device, fp64 too, memory linear in the sequence.

Every supported mask is a range of keys for each row: row i sees keys lower[i] to upper[i] - 1. The
online softmax runs over tiles of queries and keys in fp32 (fp64 with fp64 inputs).
"""

import torch
from torch import Tensor

from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.backends.base import Backend

# Elements of one tile of scores: 64 MiB in fp32.
_TILE = 1 << 24


class MathBackend(Backend):
    """Plain PyTorch."""

    name = "math"
    kernel = "tiled GEMMs in plain PyTorch"

    def unsupported_reason(self, params: AttentionParams) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(q, k, params)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out4 = out if q.dim() == 4 else out.unsqueeze(0)
        lse = torch.empty(tiles.lse_shape, dtype=tiles.dtype, device=q.device)
        for rows in tiles.row_tiles():
            q_rows = tiles.query(q, rows)
            maximum = torch.full(q_rows.shape[:-1], -torch.inf, dtype=tiles.dtype, device=q.device)
            total = torch.zeros_like(maximum)
            acc = torch.zeros_like(q_rows)
            for keys in tiles.key_tiles(rows):
                scores = tiles.scores(q_rows, tiles.keyed(k, keys), rows, keys)
                new = torch.maximum(maximum, scores.amax(-1))
                base = new.masked_fill(new == -torch.inf, 0.0)  # no key yet: exp(-inf - 0) = 0
                probs = torch.exp(scores - base.unsqueeze(-1))
                decay = torch.exp(maximum - base)
                total = total * decay + probs.sum(-1)
                acc = acc * decay.unsqueeze(-1) + probs @ tiles.keyed(v, keys)
                maximum = new
            acc = acc / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
            out4[:, rows] = tiles.to_rows(acc).to(out.dtype)
            lse[:, :, rows] = tiles.to_lse(
                maximum.masked_fill(maximum == -torch.inf, 0.0) + total.log()
            )
        return out, lse if q.dim() == 4 else lse[0]

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _Tiles(q, k, params)
        lse = lse if q.dim() == 4 else lse.unsqueeze(0)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without a key: exp is 0
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dq4 = dq if q.dim() == 4 else dq.unsqueeze(0)
        dk = torch.zeros(tiles.key_shape, dtype=tiles.dtype, device=q.device)
        dv = torch.zeros_like(dk)
        for rows in tiles.row_tiles():
            q_rows, dout_rows = tiles.query(q, rows), tiles.query(dout, rows)
            delta = (dout_rows * tiles.query(out, rows)).sum(-1, keepdim=True)
            lse_rows = tiles.from_lse(lse[:, :, rows]).unsqueeze(-1)
            dq_rows = torch.zeros_like(q_rows)
            for keys in tiles.key_tiles(rows):
                k_tile, v_tile = tiles.keyed(k, keys), tiles.keyed(v, keys)
                probs = torch.exp(tiles.scores(q_rows, k_tile, rows, keys) - lse_rows)
                dscores = probs * (dout_rows @ v_tile.mT - delta) * params.softmax_scale
                dq_rows += dscores @ k_tile
                dk[:, :, keys] += dscores.mT @ q_rows
                dv[:, :, keys] += probs.mT @ dout_rows
            dq4[:, rows] = tiles.to_rows(dq_rows).to(dq.dtype)
        dk, dv = (grad.transpose(1, 2).to(k.dtype) for grad in (dk, dv))
        return (dq, dk, dv) if q.dim() == 4 else (dq, dk[0], dv[0])


class _Tiles:
    """Tiles of queries and keys; a tile of queries is [b, ng, np / ng * rows, hn]."""

    def __init__(self, q: Tensor, k: Tensor, params: AttentionParams):
        self.params = params
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.batch = q.shape[0] if q.dim() == 4 else 1
        self.num_q, self.num_k = q.shape[-3], k.shape[-3]
        self.groups = k.shape[-2]
        self.per_group = q.shape[-2] // max(1, self.groups)
        self.lse_shape = (self.batch, q.shape[-2], self.num_q)
        self.key_shape = (self.batch, self.groups, self.num_k, k.shape[-1])
        side = int((_TILE / max(1, self.batch * q.shape[-2])) ** 0.5)
        self.side = min(1024, max(32, side))
        self.lower, self.upper = key_ranges(params)
        self.cuts = self._cuts()

    def _cuts(self) -> list[int]:
        """Row tiles end at the ends of documents, because 0 times NaN is NaN.

        A value that is not finite then stays in its document. On CUDA the ends are not read, which
        would wait for the device.
        """
        ends = [0, self.num_q]
        if self.params.packed and self.lower.device.type == "cpu":
            ends += [end for end in self.params.cu_seqlens_q.tolist() if end < self.num_q]
        return sorted(set(ends))

    def row_tiles(self):
        for first, last in zip(self.cuts, self.cuts[1:]):
            for start in range(first, last, self.side):
                yield slice(start, min(start + self.side, last))

    def key_tiles(self, rows: slice):
        first, last = self._key_range(rows)
        for start in range(first, last, self.side):
            yield slice(start, min(start + self.side, last))

    def _key_range(self, rows: slice) -> tuple[int, int]:
        """Keys that any of the rows sees; on CUDA an upper bound, which does not wait."""
        if self.lower.device.type == "cpu":
            lower, upper = self.lower[rows], self.upper[rows]
            seen = upper > lower
            if not seen.any():
                return 0, 0
            return int(lower[seen].min()), int(upper[seen].max())
        if not self.params.causal or (self.params.packed and not self.params.same_lengths):
            return 0, self.num_k
        offset = self.num_k - self.num_q
        first = max(0, rows.start + offset - self.params.window_size[0])
        first = first if self.params.has_window else 0
        return first, rows.stop + offset

    def query(self, x: Tensor, rows: slice) -> Tensor:
        x = x if x.dim() == 4 else x.unsqueeze(0)
        x = x[:, rows].to(self.dtype).unflatten(2, (self.groups, self.per_group))
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def keyed(self, x: Tensor, keys: slice) -> Tensor:
        x = x if x.dim() == 4 else x.unsqueeze(0)
        return x[:, keys].to(self.dtype).transpose(1, 2)

    def scores(self, q_rows: Tensor, k_tile: Tensor, rows: slice, keys: slice) -> Tensor:
        scores = (q_rows @ k_tile.mT) * self.params.softmax_scale
        position = torch.arange(keys.start, keys.stop, device=q_rows.device)
        hidden = position < self.lower[rows].unsqueeze(-1)
        hidden |= position >= self.upper[rows].unsqueeze(-1)
        return (
            scores.unflatten(2, (self.per_group, -1)).masked_fill_(hidden, -torch.inf).flatten(2, 3)
        )

    def to_rows(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self.per_group, -1)).permute(0, 3, 1, 2, 4)
        return x.flatten(2, 3)

    def to_lse(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.per_group, -1)).flatten(1, 2)

    def from_lse(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).unflatten(1, (self.groups, self.per_group)).flatten(2, 3)


def key_ranges(params: AttentionParams) -> tuple[Tensor, Tensor]:
    """First key that each query sees, and one past the last, [num_tokens_q] int64.

    They are equal for a query that sees no key. The last query of a sequence is aligned with its
    last key; without the causal mask a query sees all keys of its document. Neither bound ever
    decreases.
    """
    num_q, num_k = params.num_tokens_q, params.num_tokens_k
    rows = torch.arange(num_q, device=params.device)
    if not params.packed:
        first, upper = torch.zeros_like(rows), rows + (num_k - num_q) + 1
        if not params.causal:
            upper = torch.full_like(rows, num_k)
    else:
        cu_q, cu_k = params.cu_seqlens_q.long(), params.cu_seqlens_k.long()
        # In cu_q, not in cu_q[1:]: Inductor cannot search a slice.
        document = torch.searchsorted(cu_q, rows, right=True) - 1
        beyond = document >= cu_q.numel() - 1
        document = document.clamp(max=cu_q.numel() - 2)
        first = cu_k[document]
        upper = cu_k[document + 1]
        if params.causal:
            upper = rows + 1 + upper - cu_q[document + 1]
        upper = upper.masked_fill(beyond, num_k)  # tokens after the last document see nothing
        first = first.masked_fill(beyond, num_k)
    upper = torch.maximum(upper, first)
    if not params.has_window:
        return first, upper
    return torch.maximum(first, upper - 1 - params.window_size[0]), upper
