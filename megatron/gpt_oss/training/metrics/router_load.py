# Copyright (c) 2026, the megatron-core gptoss authors.
"""How evenly a step's tokens spread over the experts of each layer, and how sure the routers are."""

import math
from typing import Callable

import torch
from torch import Tensor

from megatron.core.device_utils import current_device
from megatron.core.transformer.moe.router import TopKRouter


class RouterLoad:
    """Counts on the forward passes of the steps that are to be looked at.

    Args:
        num_layers, num_experts: of the whole model.
        is_wanted: whether the step that runs now is to be counted; asked once a router and
            micro-batch, so that other steps cost nothing else.
        expert_parallel: ranks that share the experts of a layer, each with as many in a row.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        is_wanted: Callable[[], bool],
        expert_parallel: int = 1,
    ):
        self._is_wanted = is_wanted
        self._expert_parallel = expert_parallel
        # A row a layer: choices of each expert; entropy summed over tokens; tokens.
        self._shape = (num_layers, num_experts + 2)
        self._on_device: dict[int, Tensor] = {}

    def watch(self, model_chunks: list[torch.nn.Module]) -> None:
        """Hook this rank's routers."""
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter) and not module.is_mtp_layer:
                    module.register_forward_hook(self._after_router)

    def take(self) -> dict[str, list[float]]:
        """What was counted since the last call, over all ranks. Collective.

        Returns:
            One number a layer: 'busiest_share', the share of all choices that fell on the busiest
            expert (1 / num_experts if balanced); 'busiest_rank', the choices that fell on the
            experts of the busiest expert parallel rank over the mean (1 if balanced; what
            `gptoss plan --expert-load` asks for); 'load_cv', the coefficient of variation of the
            experts' loads (0 if balanced); 'router_entropy', the mean over tokens of the entropy
            of softmax(logits) over all experts, in nats (at most ln(num_experts)).
        """
        sums = torch.zeros(self._shape, dtype=torch.float64, device=current_device())
        for layer, counted in self._on_device.items():
            sums[layer] += counted
        self._on_device.clear()
        if torch.distributed.is_initialized():
            # Each layer is counted by the ranks of its pipeline stage: every token once, or, by
            # tensor-parallel ranks that hold all tokens, equally often. Only ratios are used.
            torch.distributed.all_reduce(sums)
        return summarise(sums.cpu(), self._expert_parallel)

    def _after_router(self, router: TopKRouter, inputs: tuple, outputs: tuple) -> None:
        # A recomputed layer runs twice, the first time without gradients; evaluation is not wanted.
        if not (router.training and torch.is_grad_enabled() and self._is_wanted()):
            return
        with torch.no_grad():
            routing_map = outputs[1]
            logits = router.gating(inputs[0]).flatten(0, -2).double()
            entropy = torch.special.entr(torch.softmax(logits, dim=-1)).sum()
            row = torch.cat(
                [
                    routing_map.sum(dim=0).double(),
                    entropy.view(1),
                    entropy.new_full((1,), logits.shape[0]),
                ]
            )
        layer = router.layer_number - 1
        counted = self._on_device.get(layer)
        self._on_device[layer] = row if counted is None else counted + row


def summarise(sums: Tensor, expert_parallel: int) -> dict[str, list[float]]:
    """Shares, variation and entropy from the counts of `RouterLoad`.

    Args:
        sums: [num_layers, num_experts + 2] fp64.
        expert_parallel: divides num_experts.
    """
    load, entropy, tokens = sums[:, :-2], sums[:, -2], sums[:, -1]
    total = load.sum(dim=1)
    mean = load.mean(dim=1)
    values = {
        "busiest_share": load.amax(dim=1) / total,
        "busiest_rank": busiest_rank(load, expert_parallel),
        "load_cv": load.std(dim=1, correction=0) / mean,
        "router_entropy": entropy / tokens,
    }
    return {name: [_or_zero(number) for number in value.tolist()] for name, value in values.items()}


def busiest_rank(load: Tensor, expert_parallel: int) -> Tensor:
    """[n, experts], rows of each expert, to [n]: those of the busiest rank's experts over the mean."""
    of_ranks = load.unflatten(1, (expert_parallel, -1)).sum(dim=2)
    return of_ranks.amax(dim=1) / of_ranks.mean(dim=1)


def _or_zero(number: float) -> float:
    return number if math.isfinite(number) else 0.0
