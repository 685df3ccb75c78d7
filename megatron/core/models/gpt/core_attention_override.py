# Copyright (c) 2026, the megatron-core gptoss authors.

"""Put one core attention into every layer of a GPT spec."""


def override_core_attention(spec, core_attention: type) -> None:
    """Replace the core attention of a layer spec, or of each layer of a block spec, in place.

    Layers without attention (heterogeneous models have some) are left as they are.

    Args:
        spec: ModuleSpec of a transformer layer, or TransformerBlockSubmodules, which is what
            models with experts are built from. A block without layers (a pipeline stage that
            holds none) is fine.
        core_attention: the class to build, such as DotProductAttention.
    Raises:
        ValueError: if there are layers, and none has a core attention.
    """
    layers = spec.layer_specs if hasattr(spec, "layer_specs") else [spec]
    found = False
    for layer in layers:
        attention = getattr(getattr(layer, "submodules", None), "self_attention", None)
        submodules = getattr(attention, "submodules", None)
        if hasattr(submodules, "core_attention"):
            submodules.core_attention = core_attention
            found = True
    if layers and not found:
        raise ValueError(
            f"--attention-backend local: no layer of the spec {type(spec).__name__} has a "
            "core_attention to replace. Use a spec of TransformerLayers, or another backend."
        )
