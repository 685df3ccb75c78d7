# Copyright (c) 2026, the megatron-core gptoss authors.
"""Expert load and router entropy of each layer in a step."""

import math
from typing import Callable

import torch
from torch import Tensor

from megatron.core.device_utils import current_device
from megatron.core.transformer.moe.router import TopKRouter


class RouterLoad:
    """Counts the routed tokens of monitored steps in forward hooks on the routers.

    Args:
        num_layers, num_experts: of the full model.
        is_monitored: whether the current step is counted; called once per router and micro-batch.
        expert_parallel: expert-parallel size; each rank has a contiguous block of experts.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        is_monitored: Callable[[], bool],
        expert_parallel: int = 1,
    ):
        self._is_monitored = is_monitored
        self._expert_parallel = expert_parallel
        # Per layer: routed tokens of each expert; entropy summed over tokens; number of tokens.
        self._shape = (num_layers, num_experts + 2)
        self._on_device: dict[int, Tensor] = {}

    def watch(self, model_chunks: list[torch.nn.Module]) -> None:
        """Register forward hooks on this rank's routers."""
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter) and not module.is_mtp_layer:
                    module.register_forward_hook(self._after_router)

    def take(self) -> dict[str, list[float]]:
        """Statistics over all ranks since the last call. Collective.

        Returns:
            One number per layer:
            'max_expert_share': share of all routed tokens at the most loaded expert (1 /
                num_experts if balanced).
            'ep_load_imbalance': routed tokens of the most loaded expert-parallel rank over the mean
                of the ranks (1 if balanced); the value of `gptoss plan --expert-load`.
            'load_cv': coefficient of variation of the expert loads (0 if balanced).
            'router_entropy': mean over tokens of the entropy of softmax(logits) over all experts,
                in nats (at most ln(num_experts)).
        """
        sums = torch.zeros(self._shape, dtype=torch.float64, device=current_device())
        for layer, counted in self._on_device.items():
            sums[layer] += counted
        self._on_device.clear()
        if torch.distributed.is_initialized():
            # The ranks of a layer's pipeline stage count every token equally often: once, or once
            # per tensor-parallel rank if each has all tokens. Only ratios are used.
            torch.distributed.all_reduce(sums)
        return summarise(sums.cpu(), self._expert_parallel)

    def _after_router(self, router: TopKRouter, inputs: tuple, outputs: tuple) -> None:
        # Skip evaluation, and the first forward of a recomputed layer, which runs without
        # gradients.
        if not (router.training and torch.is_grad_enabled() and self._is_monitored()):
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
    """The statistics of `RouterLoad.take` from its counts.

    Args:
        sums: [num_layers, num_experts + 2] fp64.
        expert_parallel: divides num_experts.
    """
    load, entropy, tokens = sums[:, :-2], sums[:, -2], sums[:, -1]
    total = load.sum(dim=1)
    mean = load.mean(dim=1)
    values = {
        "max_expert_share": load.amax(dim=1) / total,
        "ep_load_imbalance": ep_load_imbalance(load, expert_parallel),
        "load_cv": load.std(dim=1, correction=0) / mean,
        "router_entropy": entropy / tokens,
    }
    return {name: [_or_zero(number) for number in value.tolist()] for name, value in values.items()}


def ep_load_imbalance(load: Tensor, expert_parallel: int) -> Tensor:
    """Load of the most loaded expert-parallel rank over the mean of the ranks.

    Args:
        load: [n, num_experts], routed tokens of each expert.
        expert_parallel: divides num_experts.
    Returns:
        [n].
    """
    rank_load = load.unflatten(1, (expert_parallel, -1)).sum(dim=2)
    return rank_load.amax(dim=1) / rank_load.mean(dim=1)


def _or_zero(number: float) -> float:
    return number if math.isfinite(number) else 0.0
