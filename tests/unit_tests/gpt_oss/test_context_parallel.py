# Copyright (c) 2026, the megatron-core gptoss authors.

"""A GPTModel over context-parallel ranks in fp32, against transformers in one process.

Loss and every gradient after Megatron's own reductions, and the gradient norm, for each way to
exchange and together with every other kind of parallelism. Sequences are dense (a micro-batch of
two) or packed: one sequence of documents that begin and end anywhere, which transformers sees one
by one. A part of the tokens has no loss, so that the ranks hold unequal numbers of those that do;
the others have unequal weights, as the messages of a conversation may have.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron.core.transformer.sink_attention.packed import PackedSequence
from megatron.gpt_oss.checkpoint.load_hf import load_hf
from megatron.gpt_oss.training.forward_step import losses_and_loss_func
from tests.harness.gradients import gradient_errors
from tests.harness.models import TINY, build_model, trained_tensors, write_hf
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.ranks(4)

# One windowed and one full layer. The window is longer than a chunk of cp 4 and YaRN's original
# length is crossed; sinks are up to 8 and their rows of attention small or large against them.
PRESET = dataclasses.replace(
    TINY,
    num_layers=2,
    sliding_window=9,
    yarn_original_max_position_embeddings=24,
    vocab_size=272,
)
LENGTH = 48
# Chunks of cp 4 are 6 long: documents of one token, at a chunk's edge, over several chunks.
DOCUMENTS = (0, 1, 12, 13, 31, 37, 37, 47, 48)
TOLERANCE = 1e-5  # additions in another order; fp32 has 6e-8


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups; data parallel is what the world leaves."""

    world_size: int
    cp: int
    comm_type: str | tuple = "auto"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sp: bool = False
    distributed_optimizer: bool = False
    recompute: bool = False
    loss_chunk: int = 0

    @property
    def dp(self) -> int:
        return self.world_size // (self.cp * self.tp * self.pp)

    def arguments(self) -> dict:
        """As Megatron's arguments."""
        comm_types = [self.comm_type] if isinstance(self.comm_type, str) else list(self.comm_type)
        hierarchical = "a2a+p2p" in comm_types
        return dict(
            context_parallel_size=self.cp,
            cp_comm_type=comm_types,
            hierarchical_context_parallel_sizes=[2, self.cp // 2] if hierarchical else None,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            sequence_parallel=self.sp,
            # Otherwise the average over data parallel ranks is one of averages.
            calculate_per_token_loss=self.dp > 1,
            recompute_granularity="selective" if self.recompute else None,
        )


LAYOUTS = {
    **{f"cp2-{kind}": Layout(2, 2, kind) for kind in ("p2p", "all_gather", "a2a")},
    **{f"cp4-{kind}": Layout(4, 4, kind) for kind in ("p2p", "all_gather", "a2a", "a2a+p2p")},
    "cp2-each-layer": Layout(2, 2, ("p2p", "a2a"), recompute=True),
    "cp4-each-layer": Layout(4, 4, ("a2a+p2p", "all_gather")),
    "cp2-auto-ep2": Layout(2, 2, ep=2),
    "cp2-tp2": Layout(4, 2, tp=2),
    "cp2-tp2-sp-ep2": Layout(4, 2, tp=2, sp=True, ep=2, loss_chunk=7),
    "cp2-pp2": Layout(4, 2, pp=2, loss_chunk=6),
    "cp2-ep2-dp2": Layout(4, 2, ep=2, loss_chunk=5),
    "cp2-dp2-distributed-optimizer": Layout(4, 2, "a2a", distributed_optimizer=True, loss_chunk=9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights, and the results of transformers for both kinds of batches."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("context_parallel")
    write_hf(folder / "hf", PRESET, trained_tensors(PRESET), dtype=torch.float32)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    for kind in ("dense", "packed"):
        batch = make_batch(kind)
        rows = [slice(*ends) for ends in zip(DOCUMENTS, DOCUMENTS[1:]) if ends[0] < ends[1]]
        total = torch.zeros(())
        for row in rows if kind == "packed" else [slice(None)]:
            logits = model(batch["tokens"][:, row], use_cache=False).logits
            losses = F.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, row].flatten(), reduction="none"
            )
            total = total + (losses * batch["loss_mask"][:, row].flatten()).sum()
        loss = total / batch["loss_mask"].count_nonzero()
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.save({"loss": loss.detach(), "gradients": gradients}, folder / f"{kind}.pt")
    return folder


def make_batch(kind):
    """{'tokens', 'labels', 'loss_mask'}: two sequences, or one of several documents."""
    generator = torch.Generator().manual_seed(5)
    shape = (2 if kind == "dense" else 1, LENGTH)
    draw = partial(torch.randint, PRESET.vocab_size, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < torch.linspace(1.2, 0.3, LENGTH)
    weights = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, shape, generator=generator)]
    return {"tokens": draw(), "labels": draw(), "loss_mask": mask * weights}


def run(folder, layout):
    """{kind of batch: errors on this rank, relative to transformers'}."""
    from megatron.core import parallel_state as ps

    arguments = layout.arguments()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        hierarchical_context_parallel_sizes=arguments["hierarchical_context_parallel_sizes"],
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
    )
    kinds = ["dense", "packed"]
    if layout.cp > 1 and layout.comm_type in ("p2p", "a2a+p2p"):
        kinds.append("run-on")  # the same function
    return {kind: step(folder, layout, arguments, kind) for kind in kinds}


def step(folder, layout, arguments, kind):
    """Errors of loss, evaluation, gradients and gradient norms of one step."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    model = build_model(PRESET, seq_length=LENGTH, expert_tensor_parallel_size=1, **arguments)
    load_hf([model], folder / "hf")
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        clip_grad=0.0,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    model.config.grad_scale_func = optimizer.scale_loss

    batch, documents = make_batch(kind), None
    if kind != "dense":
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
        documents = PackedSequence.of(cu_seqlens, LENGTH, max_seqlen=18, run_on=kind == "run-on")
        if layout.dp > 1:  # the same on both, so that the average is that of one
            batch = {key: value.repeat(layout.dp, 1) for key, value in batch.items()}
    rows = {
        key: value.chunk(layout.dp)[ps.get_data_parallel_rank()] for key, value in batch.items()
    }
    group = ps.get_context_parallel_group()

    def forward_step(data, model):
        batch = get_batch_on_this_cp_rank(next(data), is_hybrid_cp=False, cp_group=group)
        return losses_and_loss_func(
            model,
            {**batch, "position_ids": None, "packed_seq_params": documents},
            chunk_size=layout.loss_chunk,
            num_microbatches=1,
            cp_group=group,
        )

    def schedule(forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([dict(rows)]),
            model=[ddp],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=rows["tokens"].shape[0],
            forward_only=forward_only,
        )

    expected = torch.load(folder / f"{kind.replace('run-on', 'packed')}.pt")
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    reports = [schedule(forward_only=False)]
    if layout.distributed_optimizer:
        gather_shards(ddp)
    errors = gradient_errors(model, expected["gradients"], PRESET)
    ddp.eval()
    with torch.no_grad():
        reports.append(schedule(forward_only=True))
    for what, report in zip(("loss", "evaluation"), reports):
        if report:  # the last stage
            value = report[0]["lm loss"]
            torch.distributed.all_reduce(
                value, group=ps.get_data_parallel_group(with_context_parallel=True)
            )
            errors[what] = relative(value[0] / value[1], expected["loss"])
    errors["grad norm"] = relative(optimizer.step()[1], norm(expected["gradients"].values()))
    for name, parameter in model.named_parameters():
        if not name.endswith("softmax_offset"):
            parameter.main_grad.zero_()
    sinks = [g for name, g in expected["gradients"].items() if name.endswith("sinks")]
    errors["grad norm of sinks"] = relative(optimizer.step()[1], norm(sinks))
    return errors


def gather_shards(ddp):
    """The distributed optimizer's reduced gradients lie on the ranks that own them."""
    for buffer in ddp.buffers + ddp.expert_parallel_buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def relative(value, expected):
    return abs(float(value) / float(expected) - 1)


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_model(ranks, folder, name):
    """One step on two sequences, each split over the ranks, and on one of packed documents."""
    layout = LAYOUTS[name]
    for results in ranks.run(run, folder, layout, world_size=layout.world_size):
        for kind, errors in results.items():
            wrong = {what: f"{e:.1e}" for what, e in errors.items() if not e < TOLERANCE}
            assert len(errors) > 10 and not wrong, (kind, wrong)


@pytest.mark.slow
def test_everything_together(folder):
    """Context, tensor, pipeline and expert parallelism at once, sequences split over TP too."""
    layout = Layout(8, 2, tp=2, pp=2, sp=True, ep=2, loss_chunk=7)
    with RankPool(8) as eight:
        for results in eight.run(run, folder, layout, world_size=8):
            for kind, errors in results.items():
                wrong = {what: f"{e:.1e}" for what, e in errors.items() if not e < TOLERANCE}
                assert errors and not wrong, (kind, wrong)
