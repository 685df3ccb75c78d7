# Copyright (c) 2026, the megatron-core gptoss authors.
"""The chunked loss in GPTModel's place for an `output_processor`."""

from typing import Callable

from torch import Tensor

from megatron.core.fusions.chunked_lm_loss import chunked_lm_loss
from megatron.core.transformer.parameter_hooks import before_parameters_are_read


def chunked_loss_processor(
    chunk_size: int, gradient_factor: Tensor | None = None
) -> Callable[..., Tensor]:
    """An `output_processor` for GPTModel.forward: losses [b, s] without the logits of all tokens.

    Args:
        chunk_size: tokens whose logits live at a time.
        gradient_factor: as in `chunked_lm_loss`.
    Returns:
        A function of what GPTModel hands over; the output layer's own flags say how its input and
        its vocabulary are split.
    """

    def process(*, hidden_states, output_layer, output_weight, labels, loss_mask, **_) -> Tensor:
        before_parameters_are_read(output_layer)
        return chunked_lm_loss(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,
            labels,
            loss_mask,
            chunk_size=chunk_size,
            gradient_factor=gradient_factor,
            tp_group=output_layer.tp_group,
            sequence_parallel=output_layer.sequence_parallel,
        )

    return process
