# Copyright (c) 2026, the megatron-core gptoss authors.

"""Loss and gradients of the first step of a problem, computed with transformers."""

from pathlib import Path

import torch
import torch.nn.functional as F

from megatron.gpt_oss.checkpoint.mapping import hf_to_megatron, locate
from tests.fuzz.case import Problem


def first_step(folder: Path, batches: list[dict], problem: Problem) -> tuple[float, dict]:
    """Loss and gradients of the batches that one process read in its first step.

    Args:
        folder: the Hugging Face model.
        batches: one dictionary a micro-batch, as Megatron's data loader gives it.
    Returns:
        The mean loss over all tokens that count, and {name: gradient} of what the problem trains
        on.
    """
    import transformers

    model = transformers.GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).train()
    sums, counts = [], []
    for batch in batches:
        losses = torch.cat(
            [_losses(model, batch, row, problem) for row in range(len(batch["tokens"]))]
        )
        mask = batch["loss_mask"].flatten().float()
        sums.append((losses * mask).sum())
        counts.append(mask.sum())
    total, count = torch.stack(sums), torch.stack(counts)
    mean = total.sum() / count.sum().clamp(min=1)
    (mean if problem.per_token_loss else (total / count.clamp(min=1)).mean()).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return mean.item(), gradients


def _losses(model, batch: dict, row: int, problem: Problem) -> torch.Tensor:
    """[s], the loss of every token of a sequence; packed documents are run one by one."""
    tokens, labels = batch["tokens"][row], batch["labels"][row]
    bounds = [0, len(tokens)]
    if problem.packed:
        bounds = torch.unique(batch["cu_seqlens"][row]).tolist()
    parts = []
    for start, end in zip(bounds, bounds[1:]):
        first = start if problem.positions == "run-on" else 0
        positions = torch.arange(first, first + end - start).unsqueeze(0)
        logits = model(
            tokens[start:end].unsqueeze(0), position_ids=positions, use_cache=False
        ).logits
        parts.append(F.cross_entropy(logits[0], labels[start:end], reduction="none"))
    return torch.cat(parts)


def as_megatron(key: str, like: torch.Tensor, gradients: dict, problem: Problem) -> torch.Tensor:
    """Hugging Face gradients in the layout of a Megatron tensor.

    Args:
        key: of the model's sharded state dict, layers (and experts) stacked.
        like: the unsharded Megatron tensor.
    """
    preset = problem.preset()
    read = lambda name, index: gradients[name][index]
    prepended = 0
    if key.startswith("decoder.layers."):
        prepended = 2 if ".experts.experts." in key else 1
    parts = torch.empty_like(like)
    for where in _indices(like.shape[:prepended]):
        local = like.shape[prepended:]
        location = locate(key, (*where, *(0 for _ in local)), tuple(local))
        parts[where] = hf_to_megatron(location, preset, read)
    return parts


def _indices(sizes) -> list[tuple]:
    found: list[tuple] = [()]
    for size in sizes:
        found = [(*index, number) for index in found for number in range(size)]
    return found
