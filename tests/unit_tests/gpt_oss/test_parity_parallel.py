# Copyright (c) 2026, the megatron-core gptoss authors.

"""The split model against transformers in fp32: token losses, every gradient, five AdamW steps.

Each layout reads a Megatron checkpoint that `convert to-megatron` wrote for another one, so that
what is trained here has been through conversion and re-sharding. After five steps the weights are
saved, exported to Hugging Face and compared with those that PyTorch's AdamW made of transformers'
model.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron.core import dist_checkpointing
from megatron.gpt_oss.checkpoint.export_hf import export_hf
from megatron.gpt_oss.checkpoint.hf.reader import HFReader
from megatron.gpt_oss.checkpoint.import_hf import convert_to_megatron
from megatron.gpt_oss.checkpoint.mapping import hf_names
from megatron.gpt_oss.checkpoint.torch_dist.layout import ParallelSizes
from megatron.gpt_oss.checkpoint.torch_dist.reader import find_iteration
from tests.harness.gradients import gradient_errors
from tests.harness.models import TINY, build_model, trained_tensors, write_hf

pytestmark = pytest.mark.ranks(4)

# The window and YaRN's original length are crossed by short sequences.
PRESET = dataclasses.replace(
    TINY, sliding_window=16, yarn_original_max_position_embeddings=24, vocab_size=272
)
STEPS, SEQUENCES, LENGTH = 5, 4, 40
# AdamW moves an element whose gradient is nothing but rounding by the whole learning rate, in a
# direction that chance decides; with this eps it does not.
ADAMW = dict(lr=5e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6)
CLIP = 1.0

# The layout that runs, and the one whose checkpoint it reads.
LAYOUTS = {
    "1": (ParallelSizes(), ParallelSizes(tp=2, pp=2)),
    "tp2": (ParallelSizes(tp=2), ParallelSizes(pp=2)),
    "pp2": (ParallelSizes(pp=2), ParallelSizes(ep=2)),
    "ep2": (ParallelSizes(ep=2), ParallelSizes(ep=2, pp=2)),
    "ep2-pp2": (ParallelSizes(ep=2, pp=2), ParallelSizes(tp=2)),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Five steps of transformers' model with PyTorch's AdamW, and the directory they began with."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("parity")
    write_hf(folder / "hf", PRESET, trained_tensors(PRESET), dtype=torch.float32)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager"
    ).train()
    # Megatron decays matrices alone; the experts' biases are matrices only in Hugging Face.
    decays = lambda name, p: p.dim() > 1 and not name.endswith("bias")
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if decays(n, p) is decayed],
            "weight_decay": ADAMW["weight_decay"] if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(PRESET.vocab_size, (STEPS, SEQUENCES, LENGTH + 1), generator=generator)
    losses, first = [], None
    for step in range(STEPS):
        logits = model(ids[step, :, :-1]).logits
        token_losses = F.cross_entropy(
            logits.flatten(0, 1), ids[step, :, 1:].flatten(), reduction="none"
        )
        losses.append(token_losses.mean().item())
        optimizer.zero_grad()
        token_losses.mean().backward()
        if first is None:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
            torch.save(gradients, folder / "gradients.pt")
            first = token_losses.detach().view(SEQUENCES, LENGTH)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"folder": folder, "ids": ids, "losses": losses, "tokens": first, "weights": weights}


def _build(preset, layout, **arguments):
    from megatron.core import parallel_state as ps

    sizes = dict(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    ps.initialize_model_parallel(**sizes)
    return build_model(preset, **sizes, **arguments)


def _train(folder, ids, layout, checkpoint, out):
    """Five steps on this rank: (losses, first token losses, {key: error of the gradient})."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = _build(PRESET, layout, seq_length=LENGTH)
    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(wanted, checkpoint)["model"])
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(average_in_collective=False), model
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    config = OptimizerConfig(
        optimizer="adam",
        lr=ADAMW["lr"],
        weight_decay=ADAMW["weight_decay"],
        adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1],
        adam_eps=ADAMW["eps"],
        clip_grad=CLIP,
    )
    overrides = get_standard_config_overrides(config)  # as training does: no decay of vectors
    optimizer = get_megatron_optimizer(config, [ddp], config_overrides=overrides)
    for group in optimizer.param_groups:  # what the scheduler of a run does at every step
        group["weight_decay"] = ADAMW["weight_decay"] * group["wd_mult"]
    dp_rank, dp_size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    mine = ids.chunk(dp_size, dim=1)[dp_rank]

    def forward_step(data, model):
        batch = next(data)
        positions = torch.arange(LENGTH).unsqueeze(0)
        losses = model(batch[:, :-1], positions, None, labels=batch[:, 1:].contiguous())
        return losses, lambda output: (output.mean(), {"tokens": output.detach()})

    all_losses, first, errors = [], None, {}
    for step in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine[step].split(1)),
            model=[ddp],
            num_microbatches=mine.shape[1],
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        if outputs:  # the last stage
            tokens = torch.cat([output["tokens"] for output in outputs])
            gathered = [torch.empty_like(tokens) for _ in range(dp_size)]
            torch.distributed.all_gather(gathered, tokens, group=ps.get_data_parallel_group())
            tokens = torch.cat(gathered)
            all_losses.append(tokens.mean().item())
            first = tokens if first is None else first
        if step == 0:
            errors = gradient_errors(model, torch.load(f"{folder}/gradients.pt"), PRESET)
        updated, _, _ = optimizer.step()
        assert updated
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), out)
    return all_losses, first, errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps(ranks, reference, tmp_path, record_property, name):
    (layout, written), layout_name = LAYOUTS[name], name

    def record(what, value, limit):
        record_property("parity", (f"{what}, fp32", f"layout {layout_name}", value, limit))

    checkpoint = find_iteration(
        convert_to_megatron(reference["folder"] / "hf", tmp_path / "from", written)
    )
    (tmp_path / "trained").mkdir()
    results = ranks.run(
        _train,
        str(reference["folder"]),
        reference["ids"],
        layout,
        str(checkpoint),
        str(tmp_path / "trained"),
        world_size=layout.pp * layout.stage_ranks,
    )
    record("gradient", max(max(errors.values()) for _, _, errors in results), 1e-4)
    for losses, tokens, errors in results:
        wrong = {key: error for key, error in errors.items() if not error < 1e-4}
        assert errors and not wrong, wrong
        if losses:  # a last stage
            error = max(abs(a / b - 1) for a, b in zip(losses, reference["losses"]))
            record("five AdamW steps: losses", error, 1e-5)
            assert error < 1e-5
            error = (tokens - reference["tokens"]).abs().max() / reference["tokens"].max()
            record("loss of every token", error.item(), 1e-5)
            assert error < 1e-5, error
    assert any(losses for losses, _, _ in results)
    trained = HFReader(
        export_hf(
            tmp_path / "trained", tmp_path / "back", like=reference["folder"] / "hf", dtype="fp32"
        )
    )
    start, errors = trained_tensors(PRESET), []
    for name in hf_names(PRESET):
        value, expected = trained.read(name), reference["weights"][name]
        errors.append(((value - expected).abs().max() / expected.abs().max()).item())
        assert errors[-1] < 1e-4, f"{name}: {errors[-1]:.2e}"
        moved = (expected - start[name]).abs().max() / (STEPS * ADAMW["lr"])
        assert moved > 0.3 or ".experts." in name, f"{name} hardly moved: {moved:.2e}"
    record("five AdamW steps: weights", max(errors), 1e-4)


# Every expert is chosen: where they are not, a near tie in bf16 sends a token elsewhere, by chance.
BF16_PRESET = dataclasses.replace(PRESET, num_experts=4, num_experts_per_tok=4)


def _bf16_logits(ids, layout, checkpoint):
    """Logits of this rank's model in bf16, on the last stage; each data-parallel rank makes all."""
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = _build(BF16_PRESET, layout, bf16=True).bfloat16().eval()
    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(wanted, checkpoint)["model"])

    def forward_step(data, model):
        batch = next(data)
        logits = model(batch, torch.arange(batch.shape[1]).unsqueeze(0), None)
        return logits, lambda output: (output.float().mean(), {"logits": output.detach()})

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(ids.split(1)),
        model=[model],
        num_microbatches=len(ids),
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
    if not outputs:
        return None
    logits = torch.cat([output["logits"] for output in outputs]).contiguous()
    parts = [torch.empty_like(logits) for _ in range(layout.tp)]
    torch.distributed.all_gather(parts, logits, group=ps.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1).double()


@pytest.fixture(scope="module")
@torch.no_grad()
def bf16_reference(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bf16") / "hf"
    write_hf(folder, BF16_PRESET, trained_tensors(BF16_PRESET))
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(PRESET.vocab_size, (3, 160), generator=generator)
    logits = [
        transformers.GptOssForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )(ids).logits.double()
        for dtype in (torch.float64, torch.bfloat16)
    ]
    return folder, ids, *logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16(ranks, bf16_reference, tmp_path, record_property, name):
    """No further from float64 than Hugging Face's own bf16 times 1.1."""
    folder, ids, truth, theirs = bf16_reference
    layout, written = LAYOUTS[name]
    checkpoint = find_iteration(convert_to_megatron(folder, tmp_path / "from", written))
    world_size = layout.pp * layout.stage_ranks
    results = ranks.run(_bf16_logits, ids, layout, str(checkpoint), world_size=world_size)
    error = lambda logits: ((logits - truth).square().mean() / truth.square().mean()).sqrt().item()
    results = [logits for logits in results if logits is not None]
    assert results and 1e-4 < error(theirs) < 1
    ratio = max(error(logits) for logits in results) / error(theirs)
    what = f"logits, bf16, over the {error(theirs):.1e} of Hugging Face (ratio)"
    record_property("parity", (what, f"layout {name}", ratio, 1.1))
    assert ratio <= 1.1
