# Copyright (c) 2026, the megatron-core gptoss authors.

"""Parameter groups for parameters that carry a factor of the learning rate.

An entry script sets the attribute `lr_multiplier` (float) on parameters before the model is wrapped.
Parameters of one factor share a group, which the scheduler moves along the same curve, from
--lr-warmup-init over factor * lr to factor * min_lr.
"""

from typing import Dict

from megatron.core.optimizer import OptimizerConfig, ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

ATTRIBUTE = "lr_multiplier"


def overrides(
    config: OptimizerConfig, factors: Dict[str, float]
) -> Dict[ParamKey, ParamGroupOverride]:
    """An override for each factor.

    Args:
        config: of the optimizer, with lr and min_lr.
        factors: by whatever chose the parameters; only the values are looked at.
    """
    return {
        ParamKey(predicate=_carries(factor)): ParamGroupOverride(
            max_lr=factor * config.lr, min_lr=factor * (config.min_lr or 0.0)
        )
        for factor in sorted(set(factors.values()) - {1.0})
    }


def _carries(factor: float) -> ParamPredicate:
    return ParamPredicate(
        name=f"{ATTRIBUTE}_{factor:g}",
        fn=lambda parameter: getattr(parameter, ATTRIBUTE, 1.0) == factor,
    )
