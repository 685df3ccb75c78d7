# Copyright (c) 2026, the megatron-core gptoss authors.

"""Inputs of a fuzz case: a random corpus and a random Hugging Face model."""

from pathlib import Path

import numpy
import torch

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.gpt_oss.diagnostics.random_checkpoint import random_hf_tensors
from megatron.gpt_oss.presets import Preset
from tests.fuzz.case import Problem
from tests.harness.models import write_hf

# Lengths of documents, lowest and highest; the last token of each ends it.
CORPORA = {
    "mixed": (2, 60),
    "short": (2, 9),
    "long": (70, 140),
    "single": (1, 2),  # documents that are nothing but their end
}
NUM_TOKENS = 3000


def write_corpus(prefix: Path, problem: Problem) -> Path:
    """An indexed dataset of skewed random tokens, with runs of ends: sequences without a label."""
    rng = numpy.random.default_rng(problem.seed)
    end = problem.vocab_size - 1
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    written = 0
    while written < NUM_TOKENS:
        length = int(rng.integers(*CORPORA[problem.corpus], endpoint=True))
        tokens = (end * rng.random(length) ** 2).astype(numpy.int32)
        if problem.eod_mask_loss and rng.random() < 0.1:
            # Of several of these in a row nothing is learned where the ends are masked.
            tokens = numpy.full(2 * problem.seq_length, end, dtype=numpy.int32)
        tokens[-1] = end
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        written += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_model(folder: Path, problem: Problem) -> Path:
    """A Hugging Face directory in fp32, each weight of which counts."""
    preset = problem.preset()
    return write_hf(folder, preset, model_tensors(preset, problem), dtype=torch.float32)


def model_tensors(preset: Preset, problem: Problem) -> dict[str, torch.Tensor]:
    """Weights of a trained model's kind: large sinks, biases, values on both sides of the clamp.

    Scaled by the widths, so that a model of any width has logits of about 1.
    """
    generator = torch.Generator().manual_seed(problem.seed + 1)
    tensors = random_hf_tensors(preset, problem.seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("sinks"):
            tensor.copy_(problem.sink_scale * torch.tanh(2 * noise))
        elif "norm" in name:
            tensor.add_(0.3 * noise)
        elif name.endswith("gate_up_proj_bias"):
            tensor.copy_(3 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.3 * noise)
        else:
            fan_in = tensor.shape[-2] if "experts" in name else tensor.shape[-1]
            gain = 3.0 if name.endswith("gate_up_proj") else 1.0
            tensor.copy_(gain * noise / fan_in**0.5)
    return tensors
