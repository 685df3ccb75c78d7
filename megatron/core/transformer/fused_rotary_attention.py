# Copyright (c) 2026, the megatron-core gptoss authors.

"""SelfAttention that splits linear_qkv's output and rotates queries and keys in one kernel."""

from torch import Tensor

from megatron.core.fusions.fused_qkv_rotary import fused_implementation, split_and_rotate
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp


class FusedRotarySelfAttention(SelfAttention):
    """SelfAttention for a layer spec, with the same parameters, checkpoints and arguments.

    It is SelfAttention where the fusion does not apply: CPU, inference, rotary embedding of part of
    a head, packed sequences other than PackedSequence, a norm of queries or keys, fewer key groups
    than tensor parallel ranks.
    """

    _rotation = None  # (angles, implementation) while a forward runs in which it applies

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args, **kwargs):
        """As SelfAttention.forward, which gets no rotary_pos_emb if the fusion rotates q and k."""
        if args or not self._rotates_while_splitting(hidden_states, **kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._rotation = kwargs.pop("rotary_pos_emb"), fused_implementation(hidden_states)
        try:
            return super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            self._rotation = None

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, **kwargs):
        """As SelfAttention's; the fusion rotates query and key and makes value contiguous."""
        if self._rotation is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **kwargs)
        freqs, implementation = self._rotation
        qkv, (query_width, head_dim, _) = super().get_query_key_value_tensors(
            hidden_states, key_value_states, split_qkv=False
        )
        return split_and_rotate(
            qkv, freqs, query_width // head_dim, self._yarn_concentration_factor, implementation
        )

    def _rotates_while_splitting(
        self,
        hidden_states,
        rotary_pos_emb=None,
        inference_context=None,
        inference_params=None,
        packed_seq_params=None,
        **others,
    ) -> bool:
        config = self.config
        return (
            fused_implementation(hidden_states) is not None
            and isinstance(rotary_pos_emb, Tensor)
            # [s, 1, 1, hn]: one row per token; [t, 1, hn] for packed tokens, already looked up.
            and rotary_pos_emb.dim() == (4 if packed_seq_params is None else 3)
            and rotary_pos_emb.numel() == rotary_pos_emb.size(0) * config.kv_channels
            and inference_context is None
            and inference_params is None
            and not config.no_rope_freq
            and not config.rotary_interleaved
            and not config.multi_latent_attention
            and not config.attention_output_gate
            and not config.test_mode
            and not self._fused_single_qkv_rope
            and config.num_query_groups >= self.world_size
            and all(
                norm is None or isinstance(norm, IdentityOp)
                for norm in (self.q_layernorm, self.k_layernorm)
            )
        )
