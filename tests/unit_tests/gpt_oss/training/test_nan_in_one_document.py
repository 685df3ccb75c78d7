# Copyright (c) 2026, the megatron-core gptoss authors.

"""NaN in a token affects only its own document, in a step with all fused kernels.

Documents meet in one product of an expert's rows, in one chunk of the loss, in one tile of
attention; each row must stay its own. The embedding of one token is made NaN, in a packed sequence
or in a micro-batch of sequences. Losses of all other documents, and the gradients of their
embeddings, must be those of the step without it. Gradients of weights are sums over all tokens:
they do become NaN, and the step is refused as any is whose gradients are not finite. FlexAttention,
and plain PyTorch's attention on CUDA, cross documents in a tile: they are no fast path.
"""

import dataclasses
import itertools

import pytest
import torch

from megatron.core import device_utils
from megatron.core.transformer.sink_attention.attention_params import AttentionParams
from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.core.transformer.sink_attention.registry import BACKENDS
from megatron.core.utils import get_attr_wrapped_model
from megatron.gpt_oss.presets import get_preset
from megatron.gpt_oss.training.forward_step import losses_and_loss_func
from tests.harness.compare import relative_error
from tests.harness.models import ODD

CUDA = torch.cuda.is_available()
# In the window's length of 16, around it and far beyond it; documents of one token.
DOCUMENTS = (0, 1, 18, 55, 56, 90)
SPOILT = 30  # of the document from 18 to 55
RECOMPUTE = {
    "nothing-again": {},
    "experts-in-parts": dict(
        recompute_granularity="selective", recompute_modules=["moe"], mlp_chunks_for_training=4
    ),
    "layers-again": dict(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
}


@pytest.fixture(scope="module")
def group():
    from benchmarks.lib.harness import start_alone

    if CUDA:
        torch.cuda.set_device(0)
    start_alone()
    yield
    torch.distributed.destroy_process_group()


def make_batch(vocab_size, ends, packed):
    """Documents of one sequence, or sequences of one length in the order of `ends`."""
    tokens = torch.randint(vocab_size, (ends[-1] + 1,), generator=torch.Generator().manual_seed(3))
    shape = (1, -1) if packed else (len(ends) - 1, -1)
    batch = {
        "tokens": tokens[:-1].view(shape),
        "labels": tokens[1:].view(shape),
        "loss_mask": torch.ones(ends[-1]).view(shape),
    }
    device = device_utils.current_device()
    batch = {name: tensor.contiguous().to(device) for name, tensor in batch.items()}
    if packed:
        longest = max(b - a for a, b in itertools.pairwise(ends))
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        batch["packed_seq_params"] = PackedSequence.of(cu_seqlens, ends[-1], longest)
    return batch


def step(trainer, batch, spoilt):
    """Losses and the gradients of the embeddings, [tokens, ...] each; the weights' are in main_grad.

    Without Megatron's schedule, which makes every gradient NaN on purpose when the loss is.

    Args:
        spoilt: (sequence, place) of the token that becomes NaN, or None.
    """
    seen = {}

    def embed(module, args, output):  # [s, b, h]
        seen["hidden"] = hidden = output.detach().clone()
        if spoilt is not None:
            hidden[spoilt[1], spoilt[0]] = float("nan")
        return hidden.requires_grad_()

    model = trainer.model[0]
    hook = get_attr_wrapped_model(model, "embedding").register_forward_hook(embed)
    trainer.zero_gradients()
    losses, loss_func = losses_and_loss_func(
        model, batch, chunk_size=trainer.loss_chunk, num_microbatches=1
    )
    hook.remove()
    loss, num_tokens, _ = loss_func(losses)
    (loss / num_tokens).backward()
    return losses.detach().flatten(), seen["hidden"].grad.transpose(0, 1).flatten(0, 1)


def check(preset, ends, spoilt, packed, tolerance, **options):
    """Compare a step with NaN in token `spoilt` with the one without.

    Args:
        ends: where documents begin, and where the last ends.
        tolerance: of losses and of gradients, relative to a document's.
    """
    from benchmarks.lib.harness import Trainer

    trainer = Trainer(preset, loss_chunk=25, optimizer=False, seq_length=ends[-1], **options)
    try:
        batch = make_batch(preset.vocab_size, ends, packed)
        first = next(a for a, b in itertools.pairwise(ends) if a <= spoilt < b)
        place = (0, spoilt) if packed else (ends.index(first), spoilt - first)
        expected = step(trainer, batch, None)
        assert all(x.isfinite().all() for x in expected)
        found = step(trainer, batch, place)
        assert found[0][spoilt].isnan() and found[1][spoilt].isnan().any()
        spoilt_weights = [
            name for name, p in trainer.model[0].named_parameters() if p.main_grad.isnan().any()
        ]
        assert any("experts" in name for name in spoilt_weights)
        assert any("linear_qkv" in name for name in spoilt_weights)
        for begin, end in itertools.pairwise(ends):
            if begin == first:
                continue
            for what, one, other, limit in zip(("losses", "gradients"), found, expected, tolerance):
                one, other = one[begin:end], other[begin:end]
                where = f"{what} of tokens {begin} to {end}"
                assert one.isfinite().all(), f"{where}: {int((~one.isfinite()).sum())} not finite"
                error = relative_error(one, other)
                assert error <= limit, f"{where}: relative error {error:.1e}"
    finally:
        trainer.close()


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "micro-batch"])
def test_cpu(group, packed, recompute):
    """Grouped experts, chunked loss into main_grad, attention tile by tile; fp32."""
    ends, spoilt = (DOCUMENTS, SPOILT) if packed else ((0, 40, 80, 120), 50)
    size = 1 if packed else len(ends) - 1
    options = dict(bf16=False, micro_batch_size=size, **recompute)
    check(ODD, ends, spoilt, packed, (1e-6, 1e-5), **options)


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("backend", ["auto", "aten_fa2", "fa2", "fa3", "fa4"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "micro-batch"])
@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_cuda(group, packed, backend, recompute):
    """Two layers of 20b's shape in bf16, with Triton's kernels, grouped_mm and each attention.

    `auto` takes cuDNN for full layers of a micro-batch where it is the fastest. Backwards that add
    with atomics differ from run to run in fp32's last digits.
    """
    preset = dataclasses.replace(get_preset("20b", 2), vocab_size=1024)
    if packed:  # 1 token, beyond the window of 128, at the edge of a tile, 300 with the bad one
        ends, spoilt = (0, 1, 180, 256, 556, 557, 640), 400
    else:
        ends, spoilt = (0, 320, 640, 960), 500
    tokens, size = (640, 1) if packed else (320, 3)
    heads = (preset.num_attention_heads, preset.head_dim)
    shape = (tokens, *heads) if packed else (tokens, size, *heads)
    params = AttentionParams.of_shapes(shape, shape, torch.bfloat16, "cuda")
    reason = None if backend == "auto" else BACKENDS[backend].unsupported_reason(params)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    options = dict(micro_batch_size=size, sink_attention_backend=backend, **recompute)
    check(preset, ends, spoilt, packed, (1e-3, 1e-2), **options)
