# Copyright (c) 2026, the megatron-core gptoss authors.
"""Generates text during training, in any parallel layout.

Every rank runs the forward pass of the same tokens through Megatron's schedule, and one all-reduce
collects the logits of the last position. There is no KV cache: each token recomputes the prefix,
which is fast enough for an occasional sample.
"""

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor

from megatron.core import mpu
from megatron.core.device_utils import current_device
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.sink_attention.context_parallel import global_positions
from megatron.core.utils import get_attr_wrapped_model
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer
from megatron.gpt_oss.diagnostics.sample import generate
from megatron.training import get_args, get_timers
from megatron.training.training import (
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    should_disable_forward_pre_hook,
)


def sample_live(
    model: list[torch.nn.Module],
    optimizer,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Continue a prompt with the current weights. Collective.

    Args:
        model: this rank's chunks, wrapped for training; restored to training mode.
        optimizer: Megatron's optimizer, whose updated parameters may not be gathered yet.
    Returns:
        The text, the same on every rank.
    """
    args, timers = get_args(), get_timers()
    timers("interval-time").stop()  # Do not count the sample as part of the next step.
    hooked = should_disable_forward_pre_hook(args)
    if hooked:
        disable_forward_pre_hook(model, optimizer=optimizer)
    for chunk in model:
        chunk.eval()
    try:
        logits_of = partial(last_logits, model, args)
        text = generate(logits_of, tokenizer, prompt, max_new_tokens, temperature, seed)
    finally:
        for chunk in model:
            chunk.train()
        if hooked:
            enable_forward_pre_hook(model)
    timers("interval-time", log_level=0).start(barrier=True)
    return text


@torch.no_grad()
def last_logits(model: list[torch.nn.Module], args: Namespace, ids: Tensor) -> Tensor:
    """Logits after the last of these tokens. Collective.

    Args:
        ids: [1, s] int64, the same on every rank.
    Returns:
        [1, 1, padded vocabulary] fp32 on the CPU, on every rank.
    """
    num_tokens = ids.shape[1]
    # Attention is causal and no token is dropped, so padding after the last token has no effect.
    parts = args.tensor_model_parallel_size * 2 * args.context_parallel_size
    padded = -(-num_tokens // parts) * parts
    ids = torch.nn.functional.pad(ids.to(current_device()), (0, padded - num_tokens))
    cp_rank, cp_size = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    positions = global_positions(cp_rank, cp_size, padded, ids.device)

    def forward_step(_, chunk):
        output = chunk(ids[:, positions], positions.unsqueeze(0), None)
        return output, lambda logits, non_loss_data: logits

    chunks = len(model)
    # An interleaved schedule needs a group of micro-batches; all of them are the same.
    num_microbatches = mpu.get_pipeline_model_parallel_world_size() if chunks > 1 else 1
    if chunks > 1:
        config = get_attr_wrapped_model(model[0], "config")
        num_microbatches = config.microbatch_group_size_per_vp_stage
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * chunks if chunks > 1 else None,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=padded,
        micro_batch_size=1,
        decoder_seq_length=padded,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _gather(found[0] if found else None, positions, num_tokens - 1, args)


def _gather(logits: Tensor | None, positions: Tensor, wanted: int, args: Namespace) -> Tensor:
    """All-reduce the vocabulary shards of one position; data-parallel ranks have the same logits."""
    full = torch.zeros(args.padded_vocab_size, device=positions.device)
    place = (positions == wanted).nonzero().flatten()
    if logits is not None and place.numel() and mpu.get_data_parallel_rank() == 0:
        part = logits[0, place[0]].float()
        start = 0
        if part.numel() < full.numel():
            start = mpu.get_tensor_model_parallel_rank() * part.numel()
        is_copy = part.numel() == full.numel() and mpu.get_tensor_model_parallel_rank() != 0
        if not is_copy:
            full[start : start + part.numel()] = part
    torch.distributed.all_reduce(full)
    return full.view(1, 1, -1).cpu()
