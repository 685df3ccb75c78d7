# Copyright (c) 2026, the megatron-core gptoss authors.

"""The core attention of a layer spec that runs on the kernels of `sink_attention`."""

from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.sink_attention.megatron_module import core_attention


class SinkDotProductAttention(DotProductAttention):
    """DotProductAttention on the fastest kernel of the machine.

    Parameters, arguments and checkpoints are those of DotProductAttention, whose unfused path runs
    what no kernel supports: attention dropout and mask tensors.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """As DotProductAttention.forward: [sq, b, np * hn], packed [t, np * hn]."""
        arguments = (
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias,
            packed_seq_params,
        )
        context = core_attention(self, *arguments)
        return super().forward(*arguments) if context is None else context
