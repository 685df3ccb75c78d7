# Copyright (c) 2026, the megatron-core gptoss authors.

"""Compare gradients of a model that is split over ranks with those of transformers."""

from megatron.gpt_oss.checkpoint.load_hf import sharded_tensors
from megatron.gpt_oss.checkpoint.mapping import hf_to_megatron, locate


def gradient_errors(model, gradients, preset):
    """Largest error of every parameter of this rank, relative to the largest element of its tensor.

    A sharded state dict over the gradients says which part of which global tensor each is.

    Args:
        model: this rank's GPTModel, its gradients in main_grad.
        gradients: of transformers' model, by name.
        preset: the model.
    Returns:
        {key and offset in the global tensor: error}.
    """
    values = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.main_grad.clone()
    errors, largest = {}, {}
    for name, gradient in gradients.items():
        largest[name] = gradient.abs().max()
    read_names = []

    def read(name, index):
        read_names.append(name)
        return gradients[name][index]

    for part in sharded_tensors(model.sharded_state_dict()):
        where = locate(part.key, part.global_offset, part.local_shape)
        read_names.clear()
        expected = hf_to_megatron(where, preset, read)
        scale = max(largest[name] for name in read_names)
        errors[f"{part.key}{part.global_offset}"] = (
            (part.data - expected).abs().max() / scale
        ).item()
    for parameter, value in zip(model.parameters(), values):
        parameter.data = value
    return errors
