# Copyright (c) 2026, the megatron-core gptoss authors.

"""Recognises optimizer state that an earlier writer of `fully_reshardable` checkpoints misplaced.

Megatron-Core up to 0.19 (Megatron-LM PR 5077) takes the fp32 weight and the moments of each
parameter after the first gradient bucket from where the padding of the buckets before it had been
left out: shifted, the last ones filled up with zeros. Model weights of the same checkpoint are right.
What is written now is marked. What has no mark is right with one bucket a buffer, and with several
whose ends need no padding; no argument tells that for certain (sizes, shared embeddings, pipeline
stages decide it, and another Megatron may have written it right), but the tensors do: the fp32
weight of a parameter, rounded, is its weight in the model.
"""

import re
from argparse import Namespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from .checkpoint_integrity import CheckpointLoadError

# In the content metadata of a checkpoint: offsets in the buffers count the padding of buckets.
MARK = "distrib_optim_fully_reshardable_padded_offsets"

# Relative root mean square difference of fp32 and model weights. Rounding to bf16 makes 0.002;
# another place makes about 1.4, less where all weights of a parameter are nearly the same.
ROUNDED = 0.01
QUANTIZED = 0.5
# Of a parameter whose weights fp16 rounds to nothing.
SMALLEST = 1e-7
# Elements that are compared at once: the copies in fp32 take 2 x 64 MiB.
CHUNK = 2**24


class MisplacedOptimizerState(CheckpointLoadError):
    """The optimizer state of a checkpoint is that of other parameters."""


def mark(metadata: Dict[str, Any]) -> None:
    """Add the mark to the content metadata before a save."""
    if metadata.get("distrib_optim_sharding_type") == "fully_reshardable":
        metadata[MARK] = True


def refuse_unloadable_state(
    args: Namespace, saved_args: Namespace, metadata: Optional[Dict[str, Any]]
) -> None:
    """Refuse optimizer state that does not fit this run's optimizer or expert-parallel size.

    Optimizers with and without --use-distributed-optimizer store their state in different formats,
    and the state of one without it has fp32 weights only for models in bf16 or fp16.

    `fully_reshardable` state loads at every expert-parallel size. `dp_reshardable` state needs the
    buffers of its layout. Without the distributed optimizer, the state of one optimizer cannot be
    split into two (one for experts).

    Args:
        args: arguments of this run.
        saved_args: arguments of the run that wrote the checkpoint.
        metadata: content metadata of the checkpoint.

    Raises:
        CheckpointLoadError: on every rank; names the saved and the requested format, and what to do.
    """
    _refuse_other_optimizer(args, saved_args)
    size, saved = (
        getattr(of, "expert_model_parallel_size", None) or 1 for of in (args, saved_args)
    )
    kind = (metadata or {}).get("distrib_optim_sharding_type")
    bound = size != saved if kind == "dp_reshardable" else kind is None and 1 in (size, saved)
    if size == saved or not bound:
        return
    raise CheckpointLoadError(
        f"The checkpoint's optimizer state was written with --expert-model-parallel-size {saved}"
        f" ({kind or 'without --use-distributed-optimizer'}) and does not load with {size}: "
        f"continue with {saved}, or give --no-load-optim or --finetune to load the weights alone; "
        "with --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable a run saves what "
        "loads at every size."
    )


def _refuse_other_optimizer(args: Namespace, saved_args: Namespace) -> None:
    of_run, of_checkpoint = _optimizer_flags(args), _optimizer_flags(saved_args)
    if of_checkpoint is None or of_run is None or of_run == of_checkpoint:
        return
    raise CheckpointLoadError(
        f"The checkpoint's optimizer state was written {of_checkpoint}, and this run is "
        f"{of_run}: the two keep it in different formats. Continue {of_checkpoint}, or give "
        "--no-load-optim or --finetune to load the weights alone."
    )


def _optimizer_flags(args: Namespace) -> Optional[str]:
    """The flags that decide the format of the optimizer state, as a phrase; None if unknown."""
    distributed = getattr(args, "use_distributed_optimizer", None)
    if distributed is None:
        return None
    if distributed:
        return "with --use-distributed-optimizer"
    low = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    return f"without --use-distributed-optimizer, {'in fp32' if low is None else f'with --{low}'}"


def refuse_misplaced_state(
    optimizer: Any,
    model: List[torch.nn.Module],
    state_dict: Dict[str, Any],
    checkpoint_name: str,
) -> None:
    """Compare the optimizer's fp32 weights of an unmarked checkpoint with the model's.

    Call it on all ranks after the model is loaded and before the optimizer is, which may hold the fp32
    weights in the model's own memory.

    Args:
        optimizer: of this rank, with buffers in the order of the state; None if none is loaded.
        model: the model chunks, for parameter names.
        state_dict: of the checkpoint, with 'optimizer', 'args' and 'content_metadata'.
        checkpoint_name: directory of the checkpoint.

    Raises:
        MisplacedOptimizerState: on every rank; names what is lost and what to do.
    """
    metadata = state_dict.get("content_metadata") or {}
    if (
        optimizer is None
        or metadata.get("distrib_optim_sharding_type") != "fully_reshardable"
        or metadata.get(MARK)
    ):
        return
    names = {parameter: name for chunk in model for name, parameter in chunk.named_parameters()}
    saved_args = state_dict.get("args")
    compared = misplaced = not_compared = 0  # elements
    first = None
    for parameter, saved in _saved_weights(optimizer, state_dict.get("optimizer") or {}):
        if saved is None:
            not_compared += parameter.numel()
            continue
        compared += saved.numel()
        if _is_misplaced(parameter, saved):
            misplaced += saved.numel()
            first = first or re.sub(r"^(module\.)+", "", names.get(parameter, "a parameter"))
    found = [(compared, misplaced, not_compared, first)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, found[0])
    compared, misplaced, not_compared = (sum(of_rank[i] for of_rank in found) for i in range(3))
    if misplaced:
        first = next(filter(None, (of_rank[3] for of_rank in found)))
        what = (
            f"is that of other parameters for {100 * misplaced / compared:.3g} % of the weights or "
            f"more ({first!r} is the first)"
        )
    elif not_compared > compared and _may_have_several_buckets(saved_args):
        what = "may be that of other parameters for all weights but those of the first bucket"
    else:
        return
    raise MisplacedOptimizerState(
        f"The optimizer state in {checkpoint_name} {what}: it was written"
        f"{_by_arguments(saved_args)} by a Megatron-Core that misplaces what follows the first "
        "gradient bucket, so that the fp32 weights and Adam moments of these parameters are lost, "
        "while the model's own weights are right. --no-load-optim continues from these with new "
        "moments, --finetune does so from step 0; an earlier checkpoint helps only if it was "
        "written with one bucket (without --overlap-grad-reduce)."
    )


def _saved_weights(
    optimizer: Any, state: Dict[Any, Any]
) -> Iterator[Tuple[torch.nn.Parameter, Optional[torch.Tensor]]]:
    """Each parameter of the distributed optimizers with its fp32 weight in the checkpoint.

    The weight is None if the checkpoint has only the remainder of rounding it to bf16.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state] if len(parts) == 1 else [state.get(index, {}) for index in range(len(parts))]
    for part, part_state in zip(parts, states):
        # As DistributedOptimizer.sharded_param_state_fully_reshardable() numbers them.
        parameters = (
            parameter
            for buffer in getattr(part, "buffers", ())
            for parameter in buffer.param_index_map
        )
        saved_state = part_state.get("param_state") or {}
        for index, parameter in enumerate(parameters):
            saved = saved_state.get(index, {}).get("param")
            if isinstance(saved, torch.Tensor):
                yield parameter, None if _is_remainder(part.config, parameter) else saved


def _is_remainder(config: Any, parameter: torch.nn.Parameter) -> bool:
    return (
        getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False)
        and getattr(config, "store_param_remainders", False)
        and parameter.dtype == torch.bfloat16
    )


def _may_have_several_buckets(args: Optional[Namespace]) -> bool:
    overlap = getattr(args, "overlap_grad_reduce", False)
    return overlap and getattr(args, "ddp_num_buckets", None) != 1


@torch.no_grad()
def _is_misplaced(parameter: torch.nn.Parameter, saved: torch.Tensor) -> bool:
    """Whether the fp32 weights differ from the parameter by more than rounding."""
    quantized = type(parameter.data) is not torch.Tensor
    weights = (parameter.detach().float() if quantized else parameter.detach()).reshape(-1)
    saved = saved.reshape(-1)
    difference = scale = 0.0
    for begin in range(0, saved.numel(), CHUNK):
        ours = weights[begin : begin + CHUNK].to(device="cpu", dtype=torch.float32)
        theirs = saved[begin : begin + CHUNK].to(device="cpu", dtype=torch.float32)
        difference += (ours - theirs).square().sum(dtype=torch.float64).item()
        scale += ours.square().sum(dtype=torch.float64).item()
    # Not `>`, so that NaN counts as misplaced.
    allowed = (QUANTIZED if quantized else ROUNDED) ** 2 * scale + SMALLEST**2 * saved.numel()
    return not difference <= allowed


def _by_arguments(args: Optional[Namespace]) -> str:
    """The flags that set the bucket size of the run that wrote the checkpoint."""
    for name in ("ddp_num_buckets", "ddp_bucket_size"):
        value = getattr(args, name, None)
        if value is not None:
            return f" with --{name.replace('_', '-')} {value}"
    return " with --overlap-grad-reduce" if getattr(args, "overlap_grad_reduce", False) else ""
