# Copyright (c) 2026, the megatron-core gptoss authors.

"""--memory: the flags of each policy, flags that override it, and equal losses."""

import dataclasses
import sys

import pytest
import torch

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.arguments.recompute import POLICIES
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.output_processor import chunked_loss_processor
from tests.harness.compare import relative_error
from tests.harness.models import ODD

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]


def _parsed(monkeypatch, flags):
    argv = ["--preset", "tiny", *NULL, *flags.split()]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_oss.py", *argv])
    args = read(argv).args
    return (
        args.recompute_granularity,
        args.recompute_modules,
        args.recompute_method,
        args.recompute_num_layers,
        args.lm_loss_chunk_size,
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", (None, None, None, None, 4096)),
        ("--memory fast", (None, None, None, None, 4096)),
        ("--memory balanced", ("selective", ["moe_act"], None, None, 4096)),
        ("--memory experts", ("selective", ["moe"], None, None, 2048)),
        ("--memory lean", ("full", None, "uniform", 1, 2048)),
        # The command line overrides; a recompute flag replaces all recomputation flags of the
        # policy.
        ("--memory lean --lm-loss-chunk-size 0", ("full", None, "uniform", 1, 0)),
        ("--memory lean --use-mup --allow-untested-flags", ("full", None, "uniform", 1, 0)),
        ("--memory lean --recompute-granularity selective", ("selective", None, None, None, 2048)),
        ("--memory fast --lm-loss-chunk-size 64", (None, None, None, None, 64)),
        (
            "--memory balanced --recompute-granularity full --recompute-method block "
            "--recompute-num-layers 2",
            ("full", None, "block", 2, 4096),
        ),
    ],
)
def test_flags(monkeypatch, flags, expected):
    assert _parsed(monkeypatch, flags) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--memory small", "choose from"),
        ("--memory balanced --no-moe-grouped-gemm", "or --memory lean"),
        (
            "--memory balanced --transformer-impl transformer_engine --no-moe-grouped-gemm",
            "needs grouped GEMMs. Give --moe-grouped-gemm, or --memory lean",
        ),
    ],
)
def test_refused(flags, message):
    argv = ["--preset", "tiny", *NULL, *flags.split()]
    with pytest.raises(UsageError, match=message):
        read(argv)


def test_same_losses_and_gradients(make_model):
    """Recomputed tensors are equal: fp32, so that rounding hides nothing."""
    preset = dataclasses.replace(ODD, num_layers=2)
    ids = torch.randint(preset.vocab_size, (2, 37), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(37).expand(2, -1)
    mask = torch.ones(2, 37)
    found, kept, weights = {}, {}, None
    for name, policy in POLICIES.items():
        overrides = {dest: flag for dest, flag in policy.items() if dest != "lm_loss_chunk_size"}
        model = make_model(preset, seq_length=37, moe_grouped_gemm=True, **overrides).train()
        options = {}
        if "lm_loss_chunk_size" in policy:
            options["output_processor"] = chunked_loss_processor(20)
        if weights is not None:
            model.load_state_dict(weights)
        weights = model.state_dict()
        storages = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses = model(ids, positions, None, labels=ids.roll(-1, 1), loss_mask=mask, **options)
        kept[name] = sum(storages.values())
        losses.sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        found[name] = {"losses": losses.detach(), **gradients}
    expected = found.pop("fast")
    for name, values in found.items():
        assert values.keys() == expected.keys()
        for key, value in values.items():
            error = relative_error(value, expected[key])
            assert error < 1e-5, f"{name}: {key}: relative error {error:.1e}"
    # and less is kept: that the flags reach the layers
    assert kept["lean"] < 0.7 * kept["experts"] < 0.7 * kept["balanced"] < 0.7 * kept["fast"]
