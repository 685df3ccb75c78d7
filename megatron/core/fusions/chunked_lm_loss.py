# Copyright (c) 2026, the megatron-core gptoss authors.

"""Output layer and cross entropy over chunks of tokens: only the logits of one chunk are in memory.

gpt-oss has 201,088 logits per token, 13 GB in bf16 for 32k tokens and twice that for the loss in
fp32. The forward computes the logits of a chunk, its losses, and at once the gradients of hidden
states and weight. The backward only scales those gradients. It requires what every language model
loss has: the gradient of a token's loss is its loss weight times one common factor. If the caller
gives that factor to the forward, the weight's gradient is added to `main_grad` there, which saves a
tensor of the weight's size, 2.3 GB in fp32.

Shapes: s tokens of the sequence (all of them, also with sequence parallelism), b micro batch,
h hidden, v vocabulary of this tensor parallel rank, n rows (token, sample) of a chunk.
"""

import torch
from torch import Tensor

from megatron.core.kernel_selection import triton_or_torch
from megatron.core.utils import get_pg_rank, get_pg_size

# Relative tolerance of the gradient of the losses against factor * weights.
_TOLERANCE = 1e-3
# Relative tolerance of that factor against the given one.
_FACTOR_TOLERANCE = 1e-5
CROSS_ENTROPY = triton_or_torch("chunked_lm_loss", "megatron.core.fusions.chunked_lm_loss_triton")


def chunked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    *,
    chunk_size: int = 1024,
    z_loss: float = 0.0,
    gradient_factor: Tensor | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Cross entropy of every token, without the logits of all tokens in memory.

    Args:
        hidden: [s, b, h], or [s / tp, b, h] with sequence parallelism; bf16, fp16, fp32 or fp64.
        weight: [v, h] in the dtype of hidden: this rank's rows of the output layer.
        labels: [b, s] int64, indices into the whole vocabulary.
        loss_weights: [b, s], weight of each token in the loss, usually the loss mask; 1 by default.
            The gradient of the losses must be a multiple of it.
        chunk_size: tokens whose logits are in memory at a time.
        z_loss: adds z_loss * logsumexp(logits)^2 to a token's loss.
        gradient_factor: factor of loss_weights in the gradient of the losses, a tensor of one
            number. With it, and a weight with a `main_grad` in fp32 (Megatron's DDP), the forward
            adds the weight's gradient there.
        tp_group: tensor parallel group over which the vocabulary is split.
        sequence_parallel: hidden holds this rank's part of the sequence.
    Returns:
        [b, s] fp32 (fp64 with fp64 inputs): losses, not multiplied by loss_weights.
    Raises:
        ValueError: shapes or chunk_size do not fit; or, in the backward, its gradient is not a
            multiple of loss_weights, or not gradient_factor times them (on a GPU as a device-side
            assertion, which waits for nothing).
    """
    rows = hidden.shape[0] * hidden.shape[1]
    tp_size = 1 if tp_group is None else get_pg_size(tp_group)
    expected = rows * (tp_size if sequence_parallel else 1)
    if labels.numel() != expected or labels.dim() != 2:
        raise ValueError(
            f"labels: {list(labels.shape)} for hidden states {list(hidden.shape)} of {tp_size} "
            f"tensor parallel ranks{' with sequence parallelism' if sequence_parallel else ''}; "
            f"wanted [b, s] with {expected} tokens in all."
        )
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights: {list(loss_weights.shape)}; wanted {list(labels.shape)} as labels."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}; wanted at least 1 token.")
    training = torch.is_grad_enabled()
    return _ChunkedLmLoss.apply(
        hidden,
        weight,
        labels,
        loss_weights,
        chunk_size,
        z_loss,
        gradient_factor,
        tp_group,
        sequence_parallel,
        training,
    )


def lm_loss_ref(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """The definition, on one rank with all logits at once: [b, s]."""
    logits = (hidden @ weight.t()).transpose(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse = logits.logsumexp(-1)
    return lse - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + z_loss * lse**2


class _ChunkedLmLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        labels,
        loss_weights,
        chunk_size,
        z_loss,
        gradient_factor,
        tp_group,
        sequence_parallel,
        training,
    ):
        need_dhidden, need_dweight = (training and need for need in ctx.needs_input_grad[:2])
        tokens = _Rows(hidden, labels, loss_weights, tp_group, sequence_parallel)
        losses = torch.empty(
            tokens.labels.shape, dtype=_precise(hidden.dtype), device=hidden.device
        )
        dhidden = torch.empty_like(tokens.hidden) if need_dhidden else None
        dweight = _weight_gradient(weight, gradient_factor) if need_dweight else None
        for rows in tokens.chunks(chunk_size):
            chunk = tokens.gather(rows)
            weights = tokens.weights[:, rows].reshape(-1)
            if dweight is not None:
                weights = dweight.scale(weights)
            chunk_losses, dlogits = _cross_entropy(
                chunk @ weight.t(),
                tokens.labels[:, rows].reshape(-1),
                weights if need_dhidden or need_dweight else None,
                z_loss,
                tp_group,
                tokens.tp_size,
            )
            losses[:, rows] = chunk_losses.view(tokens.parts, -1)
            if need_dhidden:
                dhidden[rows] = tokens.scatter(dlogits @ weight)
            if need_dweight:
                _add_product_(dweight.total, dlogits.t(), chunk)
            del dlogits
        if need_dhidden:
            if tokens.tp_size > 1 and not sequence_parallel:
                torch.distributed.all_reduce(dhidden, group=tp_group)
            dhidden = dhidden.view_as(hidden)
        saved = dweight.pop_saved() if need_dweight else None
        ctx.save_for_backward(dhidden, loss_weights, saved)
        ctx.dweight = dweight
        return losses.view(-1, labels.shape[0]).t().contiguous()  # rows run over [s, b]

    @staticmethod
    def backward(ctx, dlosses):
        # The gradients are scaled in place. A second backward through a retained graph would scale
        # them again.
        if getattr(ctx, "used", False):
            raise RuntimeError("The backward of chunked_lm_loss was called twice.")
        ctx.used = True
        dhidden, loss_weights, saved = ctx.saved_tensors
        factor, dweight = _common_factor(dlosses, loss_weights), None
        if ctx.dweight is not None:
            dweight, factor = ctx.dweight.finish(saved, factor)
            ctx.dweight = None
        if dhidden is not None:
            dhidden.mul_(factor)
        return dhidden, dweight, *(None,) * 8


def _weight_gradient(weight: Tensor, gradient_factor: Tensor | None):
    """Where the forward accumulates the weight's gradient: `main_grad` if it can, else a tensor.

    `main_grad` takes it if the factor is known, and Megatron's DDP has one in fp32. Not that of a
    weight shared with the embedding, which also gets what autograd computes.
    """
    main_grad = getattr(weight, "main_grad", None)
    usable = (
        gradient_factor is not None
        and main_grad is not None
        and main_grad.dtype == torch.float32
        and hasattr(weight, "grad_added_to_main_grad")
        and not getattr(weight, "zero_out_wgrad", False)
    )
    return _MainGrad(weight, gradient_factor) if usable else _OwnGrad(weight)


class _OwnGrad:
    """The weight's gradient in a tensor of its own, which the backward scales.

    Attributes:
        total: [v, h], fp32 (fp64 for fp64); the forward adds to it.
    """

    def __init__(self, weight: Tensor):
        self.total = torch.zeros_like(weight, dtype=_precise(weight.dtype))
        self._dtype = weight.dtype

    def scale(self, loss_weights: Tensor) -> Tensor:
        """The weights of the losses in the gradient."""
        return loss_weights

    def pop_saved(self) -> Tensor:
        """The tensor to save for the backward; afterwards only autograd holds it."""
        saved, self.total = self.total, None
        return saved

    def finish(self, saved: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient for autograd, and the factor that scales dhidden."""
        return saved.mul_(factor).to(self._dtype), factor


class _MainGrad:
    """The weight's gradient in `main_grad`, with the given factor already in the forward."""

    def __init__(self, weight: Tensor, factor: Tensor):
        self.total, self._weight, self._factor = weight.main_grad, weight, factor

    def scale(self, loss_weights: Tensor) -> Tensor:
        """The weights of the losses in the gradient."""
        return loss_weights * self._factor

    def pop_saved(self) -> Tensor:
        """The tensor to save for the backward; afterwards only autograd holds it."""
        saved, self._factor, self.total = self._factor, None, None
        return saved

    def finish(self, saved: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """A placeholder, which DDP's hook drops, and the factor that still scales dhidden.

        A factor that is NaN reaches the hidden states.
        """
        # A mask without a token gives no factor, and its gradients are 0 already.
        ratio = torch.where(factor == 0, torch.ones_like(factor), factor / saved)
        _check(
            ~((ratio - 1).abs() > _FACTOR_TOLERANCE),
            "chunked_lm_loss: the gradient of the losses is not gradient_factor times "
            "loss_weights, and the weight's gradient is in main_grad already. Give the factor by "
            "which the losses are scaled, or none.",
        )
        self._weight.grad_added_to_main_grad = True
        return torch.empty_like(self._weight), ratio


class _Rows:
    """Tokens as rows, in the order of [s, b], in the same chunks on all tensor parallel ranks.

    With sequence parallelism this rank has the rows [rank * count, (rank + 1) * count) of all; a
    chunk takes the same local rows from every rank. labels and weights are [parts, count].
    """

    def __init__(self, hidden, labels, loss_weights, tp_group, sequence_parallel):
        self.group = tp_group
        self.tp_size = 1 if tp_group is None else get_pg_size(tp_group)
        self.parts = self.tp_size if sequence_parallel else 1
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.count = self.hidden.shape[0]
        self.labels = labels.t().reshape(self.parts, self.count)
        if loss_weights is None:
            loss_weights = torch.ones_like(labels, dtype=_precise(hidden.dtype))
        self.weights = loss_weights.t().reshape(self.parts, self.count)

    def chunks(self, chunk_size: int):
        local = max(1, chunk_size // self.parts)
        for start in range(0, self.count, local):
            yield slice(start, min(start + local, self.count))

    def gather(self, rows: slice) -> Tensor:
        """Hidden states of a chunk, [n, h]."""
        chunk = self.hidden[rows]
        if self.parts == 1:
            return chunk
        gathered = chunk.new_empty(self.parts * chunk.shape[0], chunk.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, chunk.contiguous(), group=self.group)
        return gathered

    def scatter(self, dchunk: Tensor) -> Tensor:
        """This rank's part of the gradient of a chunk, summed over the parts of the vocabulary."""
        if self.parts == 1:
            return dchunk  # all ranks have all rows: one sum at the end
        part = dchunk.new_empty(dchunk.shape[0] // self.parts, dchunk.shape[1])
        torch.distributed.reduce_scatter_tensor(part, dchunk, group=self.group)
        return part


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    z_loss: float,
    tp_group: torch.distributed.ProcessGroup | None,
    tp_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Losses [n], and the gradient of sum(weights * losses) with respect to logits [n, v].

    The gradient is in the dtype of the logits, an operand of the two GEMMs that follow.
    """
    first = 0 if tp_size == 1 else get_pg_rank(tp_group) * logits.shape[-1]
    local = labels - first
    kernels = CROSS_ENTROPY.select(logits).module
    statistics = kernels.row_statistics if kernels is not None else _row_statistics_ref
    maximum, total, target = statistics(logits, local)
    if tp_size > 1:
        highest = maximum.clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=tp_group)
        both = torch.stack([total * (maximum - highest).exp(), target])
        torch.distributed.all_reduce(both, group=tp_group)
        maximum, (total, target) = highest, both
    lse = total.log() + maximum
    losses = total.log() - (target - maximum)  # large logits cancel before they are rounded
    if z_loss:
        losses = losses + z_loss * lse.square()
    if weights is None:
        return losses, None
    weights = weights.to(lse.dtype)
    scale = weights if not z_loss else weights * (1 + 2 * z_loss * lse)
    if kernels is None:
        return losses, _to_gradient_ref(logits, local, lse, scale, weights)
    kernels.to_gradient_(logits, local, lse, scale, weights)
    return losses, logits


def _row_statistics_ref(logits, labels):
    """`chunked_lm_loss_triton.row_statistics` in plain PyTorch."""
    values = logits.to(_precise(logits.dtype))
    maximum = values.amax(-1)
    elsewhere = (labels < 0) | (labels >= logits.shape[-1])
    target = values.gather(-1, labels.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1)
    total = (values - maximum.unsqueeze(-1)).exp_().sum(-1)
    return maximum, total, target.masked_fill(elsewhere, 0.0)


def _to_gradient_ref(logits, labels, lse, scale, weights):
    """`chunked_lm_loss_triton.to_gradient_` in plain PyTorch, and not in place."""
    probs = logits.to(_precise(logits.dtype)).sub_(lse.unsqueeze(-1)).exp_()
    probs *= scale.unsqueeze(-1)
    elsewhere = (labels < 0) | (labels >= logits.shape[-1])
    columns = labels.masked_fill(elsewhere, 0).unsqueeze(-1)
    probs.scatter_add_(-1, columns, -weights.masked_fill(elsewhere, 0.0).unsqueeze(-1))
    return probs.to(logits.dtype)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on CUDA a bf16 GEMM accumulates in the fp32 total without rounding."""
    if total.is_cuda and total.dtype == torch.float32 and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += a @ b


def _common_factor(dlosses: Tensor, loss_weights: Tensor | None) -> Tensor:
    """The scalar tensor c in dlosses = c * loss_weights, by least squares; checks the residual."""
    weights = torch.ones_like(dlosses) if loss_weights is None else loss_weights.to(dlosses.dtype)
    factor = (dlosses * weights).sum() / weights.square().sum().clamp(min=1e-30)
    distance = (dlosses - factor * weights).abs().max()
    limit = _TOLERANCE * (factor.abs() * weights.abs().max())
    # not (a > b): a NaN passes, for the check of non-finite gradients to report
    good = ~(distance > limit)
    message = (
        "chunked_lm_loss: the gradient of the losses is not a multiple of loss_weights. Give as "
        "loss_weights what the losses are multiplied by, or compute the loss unchunked."
    )
    _check(good, message)
    return factor


def _check(good: Tensor, message: str) -> None:
    if good.device.type != "cpu":
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
