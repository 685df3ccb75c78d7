# Copyright (c) 2026, the megatron-core gptoss authors.

"""What DotProductAttention needs to run on sink_attention."""

from argparse import Namespace

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.sink_attention.api import sink_attention
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.transformer.utils import is_layer_window_attention

# Unfused attention in DotProductAttention itself stands in for "math" where sink_attention has no
# such feature: dropout of probabilities, masks of the caller's.
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
    """The forward of DotProductAttention, or None where its own unfused path is to be taken.

    That is: vanilla softmax without a backend asked for, attention dropout in training, a mask
    tensor, a mask type other than causal. Under context parallelism never: the unfused path sees
    this rank's keys only.

    Args:
        module: the DotProductAttention.
        query: [sq, b, np, hn], or packed [t, np, hn] with packed_seq_params; under context
            parallelism this rank's chunks.
        key, value: [sk, b, ng, hn] or [t, ng, hn].
    Returns:
        [sq, b, np * hn] or [t, np * hn].
    Raises:
        ValueError: a backend was asked for, the sequences are packed or split over ranks, and the
            layer asks for what that cannot do.
    """
    config = module.config
    backend = config.sink_attention_backend
    packed = packed_seq_params is not None
    split = config.context_parallel_size > 1
    if config.softmax_type == "vanilla" and backend is None and not packed and not split:
        return None
    problem = _problem(module, query, key, attention_mask, attn_mask_type, attention_bias, packed)
    if problem is not None:
        if packed:
            raise ValueError(f"Packed sequences in layer {module.layer_number}: {problem}.")
        if split:
            raise ValueError(f"Context parallelism in layer {module.layer_number}: {problem}.")
        if backend not in _UNFUSED:
            raise ValueError(
                f"--sink-attention-backend {backend} in layer {module.layer_number}: {problem}; or "
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
        scale=scale,
        window=layer_window(config, module.layer_number),
        backend=backend or "auto",
        deterministic=config.deterministic_mode,
        **(_documents(packed_seq_params, split) if packed else {}),
        **(_context_parallel(module) if split else {}),
    )
    return out.flatten(-2)


def _problem(module, query, key, attention_mask, attn_mask_type, attention_bias, packed):
    """What the kernels cannot do, and what to do about it, in one sentence; None if nothing."""
    dropout = module.attention_dropout.p
    if module.training and dropout > 0:
        return f"attention dropout is {dropout}, which no kernel has; set --attention-dropout 0"
    if attention_mask is not None and not packed:
        return (
            f"a mask {list(attention_mask.shape)} is given, and the kernels know causal masks and "
            "windows only; set --no-create-attention-mask-in-dataloader"
        )
    if attention_bias is not None:
        return "an attention bias is given, which no kernel has; leave it out"
    mask_type = module.attn_mask_type if attn_mask_type is None else attn_mask_type
    wanted = (AttnMaskType.causal, AttnMaskType.padding_causal if packed else AttnMaskType.causal)
    if mask_type not in wanted:
        return f"the mask type is {mask_type.name}, and the kernels are causal; use causal"
    if key.shape[0] < query.shape[0]:
        return f"{query.shape[0]} queries for {key.shape[0]} keys are not self attention"
    return None


def _context_parallel(module) -> dict:
    """The group, or the groups of a2a+p2p, and how this layer exchanges in them."""
    comm_type = module.cp_comm_type or "auto"
    if comm_type == "a2a+p2p":
        name, getter = "hcp", parallel_state.get_hierarchical_context_parallel_groups
    else:
        name, getter = "cp", parallel_state.get_context_parallel_group
    # Attention built without groups of its own was given those that it used so far.
    group = getattr(module.pg_collection, name, None) or getter(check_initialized=False)
    if not group:
        raise ValueError(
            f"Context parallelism in layer {module.layer_number}: cp_comm_type is '{comm_type}', "
            f"and there is no process group '{name}'; initialize_model_parallel makes it from "
            "context_parallel_size and hierarchical_context_parallel_sizes."
        )
    return {"cp_group": group, "cp_comm_type": comm_type}


def _documents(params, split: bool) -> dict:
    """cu_seqlens and max_seqlen; those of the memory, which has the padding between documents."""
    if split and not isinstance(params, PackedSequence):
        raise ValueError(
            "packed_seq_params: under context parallelism documents are split as one sequence "
            f"here, which {type(params).__name__} does not say; make it with "
            "megatron.core.transformer.sink_attention.packed.PackedSequence.of."
        )
    if params.qkv_format not in (None, "thd"):
        raise ValueError(f"packed_seq_params: qkv_format is '{params.qkv_format}'; wanted 'thd'.")
    padded = params.cu_seqlens_q_padded
    cu_seqlens = params.cu_seqlens_q if padded is None else padded
    longest = params.longest if isinstance(params, PackedSequence) else params.max_seqlen_q
    if isinstance(longest, Tensor):  # reading it from a GPU would wait for the GPU
        longest = None if longest.is_cuda else int(longest)
    return {"cu_seqlens": cu_seqlens, "max_seqlen": longest}


def layer_window(config, layer_number: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None for all.

    Megatron's window_size=(127, 0) is 128; a negative left size is unbounded.
    """
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    left = config.window_size[0]
    return None if left < 0 else left + 1


def needs_no_attention_mask(args: Namespace) -> bool:
    """Whether the data loader's [b, 1, s, s] mask is of no use, and keeps the kernels from running.

    With --reset-attention-mask it holds the documents' bounds: it is kept, and attention unfused.
    """
    local = args.transformer_impl == "local" or args.attention_backend == AttnBackend.local
    on_kernels = (
        args.softmax_type != "vanilla"
        or args.sink_attention_backend is not None
        or args.context_parallel_size > 1
    )
    return local and on_kernels and not args.reset_attention_mask
