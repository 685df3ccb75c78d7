# Copyright (c) 2026, the megatron-core gptoss authors.

"""bf16 against float64: the error is at most that of Hugging Face's model in bf16.

A token with two nearly equal router logits goes to other experts in either implementation's bf16,
by chance, and is then wrong by tens of per cent: a handful of such tokens makes the whole root mean
square. So that is compared where every expert is chosen, and else the median over the tokens.
"""

import dataclasses

import pytest
import torch

from megatron.gpt_oss.checkpoint.load_hf import load_hf
from megatron.gpt_oss.diagnostics.random_checkpoint import random_hf_tensors
from tests.harness.models import ODD, TINY, build_model, trained_tensors, write_hf

ALL_CHOSEN = dict(num_experts=4, num_experts_per_tok=4)
CASES = {
    "tiny-T200-all-experts": (dataclasses.replace(TINY, **ALL_CHOSEN), 200, trained_tensors),
    "odd-T97-all-experts": (dataclasses.replace(ODD, **ALL_CHOSEN), 97, trained_tensors),
    "tiny-T200-fresh-all-experts": (
        dataclasses.replace(TINY, **ALL_CHOSEN),
        200,
        random_hf_tensors,
    ),
    "tiny-T200": (TINY, 200, trained_tensors),
    "odd-T97": (ODD, 97, trained_tensors),
    "one-layer-T140": (dataclasses.replace(TINY, num_layers=1), 140, trained_tensors),
}
SEEDS = 4


def bf16_errors(preset, length, weights, folder):
    """Relative errors of the logits (Hugging Face's bf16, ours) over a few seeds.

    Root mean square over everything where there is no choice of experts, else of the median token.
    """
    transformers = pytest.importorskip("transformers")
    errors = ([], [])
    for seed in range(SEEDS):
        hf = write_hf(folder / str(seed), preset, weights(preset, seed))
        ids = torch.randint(
            preset.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed)
        )
        logits = []
        for dtype in (torch.float64, torch.bfloat16):
            reference = transformers.GptOssForCausalLM.from_pretrained(
                hf, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            )
            logits.append(reference(ids).logits.double())
        model = build_model(preset, bf16=True, seq_length=length).bfloat16().eval()
        load_hf([model], hf)
        logits.append(model(ids, torch.arange(length).expand(2, -1), None).double())
        truth, theirs, ours = logits
        for found, value in zip(errors, (theirs, ours)):
            found.append((value - truth).square().mean(-1) / truth.square().mean(-1))
    no_choice = preset.num_experts == preset.num_experts_per_tok
    average = torch.mean if no_choice else torch.median
    return [average(torch.cat(found)).sqrt().item() for found in errors]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_error_of_bf16(one_rank, tmp_path, record_property, case):
    theirs, ours = bf16_errors(*CASES[case], tmp_path)
    what = f"logits, bf16, over the {theirs:.1e} of Hugging Face (ratio)"
    record_property("parity", (what, case, ours / theirs, 1.1))
    assert 1e-4 < theirs < 1  # it is bf16 that is measured
    assert ours <= 1.1 * theirs, f"{ours:.2e} of the logits, Hugging Face {theirs:.2e}"
