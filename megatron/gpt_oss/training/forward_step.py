# Copyright (c) 2026, the megatron-core gptoss authors.
"""Megatron's forward_step_func: micro-batch of this rank, forward, loss."""

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
        Dictionary of `BATCH_KEYS`, each [b, s / cp] on this rank's device, and packed_seq_params.
        Values are None on pipeline stages that need no batch; the attention mask is None if the
        kernel masks causally. packed_seq_params is None without
        --dataloader-inter-document-masking, and set on every stage with it.
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
        use_per_sequence_balancing=True,  # splits the packed sequence, not each document
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
    """Truncate Megatron's cu_seqlens [1, s + 1], padded with s, to [1, documents + 1]."""
    ends = int((cu_seqlens[0] < cu_seqlens[0, -1]).sum())
    return cu_seqlens[:, : ends + 1].contiguous()


def counted_tokens(loss_mask: Tensor, cp_group=None, per_token: bool = False) -> Tensor:
    """Number of tokens with loss, by which Megatron divides it; see `loss_func`.

    Returns:
        One int32 on the device.
    """
    num_tokens = loss_mask.count_nonzero().to(torch.int)
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
    """Sum the token losses of a micro-batch.

    Args:
        loss_mask: [b, s / cp], the weight of each token's loss; 0 for a token that does not count.
        losses: [b, s / cp], fp32, the model's output.
        num_tokens: result of `counted_tokens`; computed here by default.
        cp_group: context-parallel group of the sequence.
        per_token: --calculate-per-token-loss. With it Megatron sums losses and token counts over
            the global batch and then divides. Without it Megatron divides the loss of each
            micro-batch by num_tokens and averages the quotients over ranks. CP ranks of a sequence
            have unequal token counts, so num_tokens is then the sum over the CP group.
    Returns:
        (sum over tokens, number of tokens that count, {'lm loss': [sum, number] of this rank}).
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    own = counted_tokens(loss_mask, per_token=True)
    report = torch.cat([loss.detach().view(1), own.view(1)])
    if num_tokens is None:
        num_tokens = counted_tokens(loss_mask, cp_group, per_token)
    return loss * _cp_factor(cp_group, per_token), num_tokens, {"lm loss": report}


def gradient_factor(
    num_tokens: Tensor,
    num_microbatches: int,
    scale: Callable[[Tensor], Tensor] | None,
    *,
    cp_group=None,
    per_token: bool = False,
) -> Tensor:
    """The factor from a token's loss to the loss that Megatron runs backward on.

    Megatron divides by the numbers of tokens and micro-batches and multiplies by the loss scale.
    The chunked loss computes its gradients in the forward and therefore needs this factor there.

    Args:
        num_tokens: result of `counted_tokens`.
        num_microbatches: micro-batches of the step.
        scale: grad_scale_func of the config; may be None.
    Returns:
        One fp32 number on the device.
    """
    factor = torch.ones_like(num_tokens, dtype=torch.float32)
    factor *= _cp_factor(cp_group, per_token)
    if not per_token:
        factor /= num_tokens.clamp(min=1)
        factor /= num_microbatches
    return factor if scale is None else scale(factor)


def _cp_factor(cp_group, per_token: bool) -> int:
    """Compensates for DDP's average over CP ranks, each of which has a part of the loss sum."""
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
        batch: result of `get_batch`; labels, positions, mask and packed_seq_params may be None.
        chunk_size: tokens per chunk of output layer and loss; 0: one chunk.
        num_microbatches: micro-batches of the step.
        return_schedule_plan: build the schedule plan of the forward instead of running it, for
            --overlap-moe-expert-parallel-comm, which interleaves its nodes with the backward of
            another micro-batch.
    Returns:
        The model's output or its schedule plan, and the loss function of the output, as Megatron's
        forward_step_func returns them.
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
    """Add the document lengths of a training micro-batch to the FLOPs statistics."""
    if packed is None or not model.training or get_attr_wrapped_model(model, "vp_stage"):
        return
    update_seqlen_stats_from_cu_seqlens(packed.cu_seqlens_q)


def forward_step(
    data_iterator: Iterator, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Tensor | AbstractSchedulePlan, Callable]:
    """Megatron's forward_step_func; see `losses_and_loss_func` for the schedule plan."""
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
