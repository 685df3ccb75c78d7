# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run the forward pre-hooks of a module whose parameters are used without calling the module."""

import torch


def before_parameters_are_read(module: torch.nn.Module) -> None:
    """Run the forward pre-hooks of a module, as a call of it would.

    With --overlap-param-gather, DDP waits there for the all-gather of the module's parameters, and
    starts the next one: without it they may still be those of the step before.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, (), {})
        else:
            hook(module, ())
