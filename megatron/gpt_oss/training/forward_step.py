# Copyright (c) 2026, the megatron-core gptoss authors.
"""One forward step: the batch of this rank, the model, the loss."""

from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor

from megatron.core import mpu
from megatron.core.device_utils import current_device
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.gpt_oss.training.output_processor import chunked_loss_processor
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
DOCUMENT_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def get_batch(data_iterator: Iterator, vp_stage: int | None) -> dict:
    """The micro-batch of this rank: read on TP rank 0, broadcast over TP, split over CP.

    Returns:
        `BATCH_KEYS`, each [b, s / cp] on this rank's device, or None: on pipeline stages that need
        no batch, and the attention mask where the kernel knows that attention is causal. And
        packed_seq_params, on every stage, with --dataloader-inter-document-masking; else None.
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    if not packed and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys((*BATCH_KEYS, "packed_seq_params"))
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    max_seqlen = None
    if tp_rank == 0:
        sample, device = next(data_iterator), current_device()
        if packed:
            sample["cu_seqlens"] = _without_padding(sample["cu_seqlens"])
            max_seqlen = int(sample["max_seqlen"])
        batch = {
            key: sample[key].to(device, non_blocking=True) if sample.get(key) is not None else None
            for key in (*BATCH_KEYS, *(DOCUMENT_KEYS if packed else ()))
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,  # documents are not split one by one
    )
    batch["packed_seq_params"] = None
    if packed:
        if max_seqlen is None:
            max_seqlen = int(batch["max_seqlen"])
        batch["packed_seq_params"] = PackedSequence.of(
            batch["cu_seqlens"].flatten(),
            args.seq_length,
            max_seqlen,
            run_on=getattr(args, "document_positions", None) == "run-on",
        )
    return batch


def _without_padding(cu_seqlens: Tensor) -> Tensor:
    """[1, documents + 1] of Megatron's [1, s + 1], whose tail repeats s."""
    ends = int((cu_seqlens[0] < cu_seqlens[0, -1]).sum())
    return cu_seqlens[:, : ends + 1].contiguous()


def counted_tokens(loss_mask: Tensor, cp_group=None, per_token: bool = False) -> Tensor:
    """What Megatron divides a micro-batch's loss by: see `loss_func`. One int on the device."""
    num_tokens = loss_mask.sum(dtype=torch.float32).to(torch.int)
    if not per_token and cp_group is not None and cp_group.size() > 1:
        torch.distributed.all_reduce(num_tokens, group=cp_group)
    return num_tokens


def loss_func(
    loss_mask: Tensor,
    losses: Tensor,
    *,
    num_tokens: Tensor | None = None,
    cp_group=None,
    per_token: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses, and what Megatron averages it by.

    Args:
        loss_mask: [b, s / cp], 1 where a token counts.
        losses: [b, s / cp], fp32, the model's output.
        num_tokens: of `counted_tokens`, computed here by default.
        cp_group: the ranks that hold the rest of the sequence.
        per_token: --calculate-per-token-loss: Megatron sums losses and numbers over the whole
            global batch before it divides. Without it, it divides here and averages the quotients
            over ranks, so that a sequence's ranks must divide by the number of all of them: they
            hold unequal numbers of tokens that count.
    Returns:
        (sum over tokens, number of tokens that count, {'lm loss': [sum, number] of this rank}).
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    own = counted_tokens(loss_mask, per_token=True)
    report = torch.cat([loss.detach().view(1), own.view(1)])
    if num_tokens is None:
        num_tokens = counted_tokens(loss_mask, cp_group, per_token)
    return loss * _ranks_of_a_sequence(cp_group, per_token), num_tokens, {"lm loss": report}


def gradient_factor(
    num_tokens: Tensor,
    num_microbatches: int,
    scale: Callable[[Tensor], Tensor] | None,
    *,
    cp_group=None,
    per_token: bool = False,
) -> Tensor:
    """What a token's loss is multiplied by on its way to the backward, after `loss_func`.

    Megatron divides by the tokens and micro-batches and multiplies by the loss scale; the chunked
    loss, whose gradients are made in the forward, must know.

    Args:
        num_tokens: of `counted_tokens`.
        num_microbatches: of the step.
        scale: the config's grad_scale_func, if it has one.
    Returns:
        One fp32 number on the device.
    """
    factor = torch.ones_like(num_tokens, dtype=torch.float32)
    factor *= _ranks_of_a_sequence(cp_group, per_token)
    if not per_token:
        factor /= num_tokens.clamp(min=1)
        factor /= num_microbatches
    return factor if scale is None else scale(factor)


def _ranks_of_a_sequence(cp_group, per_token: bool) -> int:
    """DDP averages over the ranks of a sequence too, which each hold a part of its loss."""
    return 1 if per_token or cp_group is None else cp_group.size()


def losses_and_loss_func(
    model: GPTModel,
    batch: dict,
    *,
    chunk_size: int,
    num_microbatches: int,
    cp_group=None,
    return_schedule_plan: bool = False,
) -> tuple[Tensor | AbstractSchedulePlan, Callable]:
    """Run the model on a micro-batch of this rank.

    Args:
        batch: as `get_batch` gives it; labels, positions, mask and packed_seq_params may be None.
        chunk_size: tokens of head and loss at a time, 0 for all.
        num_microbatches: of the step.
        return_schedule_plan: build the plan of the forward instead of running it, as
            --overlap-moe-expert-parallel-comm asks: its schedule runs the plan's nodes between
            those of another micro-batch's backward.
    Returns:
        Megatron's forward_step_func's: the model's output or the plan that gives it, and the
        function that makes the output a loss.
    """
    config = get_model_config(model)
    loss_mask, per_token = batch["loss_mask"], config.calculate_per_token_loss
    options, num_tokens = {}, None
    if chunk_size and loss_mask is not None:
        num_tokens = counted_tokens(loss_mask, cp_group, per_token)
        factor = None
        if torch.is_grad_enabled():
            factor = gradient_factor(
                num_tokens,
                num_microbatches,
                config.grad_scale_func,
                cp_group=cp_group,
                per_token=per_token,
            )
        options["output_processor"] = chunked_loss_processor(chunk_size, factor)
    forward = model.build_schedule_plan if return_schedule_plan else model
    output = forward(
        batch["tokens"],
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=loss_mask,
        packed_seq_params=batch.get("packed_seq_params"),
        **options,
    )
    function = partial(
        loss_func, loss_mask, num_tokens=num_tokens, cp_group=cp_group, per_token=per_token
    )
    return output, function


def _count_documents(packed: PackedSequence | None, model: GPTModel) -> None:
    """Lengths of the documents of a training step, from which its FLOPs are counted."""
    if packed is None or not model.training or get_attr_wrapped_model(model, "vp_stage"):
        return
    update_seqlen_stats_from_cu_seqlens(packed.cu_seqlens_q)


def forward_step(
    data_iterator: Iterator, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Tensor | AbstractSchedulePlan, Callable]:
    """Megatron's forward_step_func; see `losses_and_loss_func` for the plan."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    _count_documents(batch["packed_seq_params"], model)
    return losses_and_loss_func(
        model,
        batch,
        chunk_size=get_args().lm_loss_chunk_size,
        num_microbatches=get_num_microbatches(),
        cp_group=mpu.get_context_parallel_group(),
        return_schedule_plan=return_schedule_plan,
    )
