# Copyright (c) 2026, the megatron-core gptoss authors.

"""DotProductAttention on the kernels of `sink_attention`."""

from argparse import Namespace

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.sink_attention.api import sink_attention
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.transformer.utils import is_layer_window_attention

# The unfused path of DotProductAttention serves as "math" for what sink_attention does not support:
# attention dropout and mask tensors.
_UNFUSED = (None, "auto", "math")


def core_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: AttnMaskType | None,
    attention_bias: Tensor | None,
    packed_seq_params,
) -> Tensor | None:
    """The forward of DotProductAttention, or None where the caller has to run its unfused path.

    The unfused path runs vanilla softmax without --sink-attention-backend, attention dropout in
    training, mask tensors, and mask types other than causal. It never runs under context
    parallelism, because it sees only the keys of this rank.

    Args:
        module: the DotProductAttention.
        query: [sq, b, np, hn], or packed [t, np, hn] with packed_seq_params; under context
            parallelism this rank's chunks.
        key, value: [sk, b, ng, hn] or [t, ng, hn].
    Returns:
        [sq, b, np * hn] or [t, np * hn].
    Raises:
        ValueError: the layer needs the unfused path, but a backend is named, the sequences are
            packed, or context parallelism splits them.
    """
    config = module.config
    backend = config.sink_attention_backend
    packed = packed_seq_params is not None
    split = config.context_parallel_size > 1
    if config.softmax_type == "vanilla" and backend is None and not packed and not split:
        return None
    reason = _unsupported_reason(
        module, query, key, attention_mask, attn_mask_type, attention_bias, packed
    )
    if reason is not None:
        if packed:
            raise ValueError(f"Packed sequences in layer {module.layer_number}: {reason}.")
        if split:
            raise ValueError(f"Context parallelism in layer {module.layer_number}: {reason}.")
        if backend not in _UNFUSED:
            raise ValueError(
                f"--sink-attention-backend {backend} in layer {module.layer_number}: {reason}; or "
                "use --sink-attention-backend math."
            )
        return None
    scale = module.softmax_scale
    if config.apply_query_key_layer_scaling:
        scale = scale * module.layer_number  # the division in the softmax's input is for fp16
    out = sink_attention(
        query,
        key,
        value,
        module.softmax_offset,
        softmax_scale=scale,
        window_size=layer_window_size(config, module.layer_number),
        backend=backend or "auto",
        deterministic=config.deterministic_mode,
        **(_documents(packed_seq_params, split) if packed else {}),
        **(_context_parallel(module) if split else {}),
    )
    return out.flatten(-2)


def _unsupported_reason(module, query, key, attention_mask, attn_mask_type, attention_bias, packed):
    """Why the kernels cannot run this call, and what to change; None if they can."""
    dropout = module.attention_dropout.p
    if module.training and dropout > 0:
        return (
            f"attention dropout is {dropout}, which no kernel supports; set --attention-dropout 0"
        )
    if attention_mask is not None and not packed:
        return (
            f"a mask {list(attention_mask.shape)} is given, but the kernels support only causal "
            "masks and windows; set --no-create-attention-mask-in-dataloader"
        )
    if attention_bias is not None:
        return "an attention bias is given, which no kernel supports; leave it out"
    mask_type = module.attn_mask_type if attn_mask_type is None else attn_mask_type
    wanted = (AttnMaskType.causal, AttnMaskType.padding_causal if packed else AttnMaskType.causal)
    if mask_type not in wanted:
        return f"the mask type is {mask_type.name}, but the kernels are causal; use causal"
    if key.shape[0] < query.shape[0]:
        return f"{query.shape[0]} queries for {key.shape[0]} keys are not self attention"
    return None


def _context_parallel(module) -> dict:
    """The process group, or the groups of a2a+p2p, and the communication type of this layer."""
    comm_type = module.cp_comm_type or "auto"
    if comm_type == "a2a+p2p":
        name, getter = "hcp", parallel_state.get_hierarchical_context_parallel_groups
    else:
        name, getter = "cp", parallel_state.get_context_parallel_group
    # pg_collection may lack them: then the global groups.
    group = getattr(module.pg_collection, name, None) or getter(check_initialized=False)
    if not group:
        raise ValueError(
            f"Context parallelism in layer {module.layer_number}: cp_comm_type is '{comm_type}', "
            f"and there is no process group '{name}'; initialize_model_parallel makes it from "
            "context_parallel_size and hierarchical_context_parallel_sizes."
        )
    return {"cp_group": group, "cp_comm_type": comm_type}


def _documents(params, split: bool) -> dict:
    """cu_seqlens and max_seqlen, with the padding between documents included."""
    if split and not isinstance(params, PackedSequence):
        raise ValueError(
            "packed_seq_params: context parallelism splits all documents as one sequence here, "
            f"which {type(params).__name__} does not describe; make it with "
            "megatron.core.transformer.sink_attention.packed.PackedSequence.of."
        )
    if params.qkv_format not in (None, "thd"):
        raise ValueError(f"packed_seq_params: qkv_format is '{params.qkv_format}'; wanted 'thd'.")
    padded = params.cu_seqlens_q_padded
    cu_seqlens = params.cu_seqlens_q if padded is None else padded
    longest = params.longest if isinstance(params, PackedSequence) else params.max_seqlen_q
    if isinstance(longest, Tensor):  # reading it from the GPU would wait
        longest = None if longest.is_cuda else int(longest)
    return {"cu_seqlens": cu_seqlens, "max_seqlen": longest}


def layer_window_size(config, layer_number: int) -> tuple[int, int] | None:
    """(left, right) of this layer's window; None for a layer without one."""
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return (max(-1, config.window_size[0]), 0)
    return None


def needs_no_attention_mask(args: Namespace) -> bool:
    """Whether the data loader's [b, 1, s, s] mask is redundant and would prevent the kernels.

    With --reset-attention-mask it contains the document boundaries: it is kept, and the attention
    is unfused.
    """
    local = args.transformer_impl == "local" or args.attention_backend == AttnBackend.local
    on_kernels = (
        args.softmax_type != "vanilla"
        or args.sink_attention_backend is not None
        or args.context_parallel_size > 1
    )
    return local and on_kernels and not args.reset_attention_mask
