# Copyright (c) 2026, the megatron-core gptoss authors.

"""TransformerEngine's RMSNorm with the checkpoint of PyTorch's: a weight and nothing else."""

from megatron.core.extensions.transformer_engine import TENorm, _get_extra_te_kwargs, te
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)


def _forget_extra_state(module, incompatible_keys) -> None:
    """A checkpoint without the object that a norm has no use for is whole."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("layernorm._extra_state")]


class TERMSNorm(te.pytorch.RMSNorm):
    """RMSNorm that neither saves nor asks for `_extra_state`, which says nothing of a norm.

    The norms of the local implementation save none, and a load of a checkpoint that lacks an object
    fails.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_forget_extra_state)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The weight, replicated over the tensor parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class TECheckpointedNorm:
    """Builds what TENorm builds, and TERMSNorm in place of RMSNorm without a fused residual."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        if config.normalization != "RMSNorm" or config.fused_residual_rmsnorm:
            return TENorm(config, hidden_size, eps, has_residual=has_residual)
        return TERMSNorm(
            normalized_shape=hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            zero_centered_gamma=config.layernorm_zero_centered_gamma,
            **_get_extra_te_kwargs(config),
        )
