# Copyright (c) 2026, the megatron-core gptoss authors.

"""Random problems and layouts.

Most draws respect what Megatron asks of a layout (what divides what); a few do not, for a layout
that is refused has to be refused in one sentence.
"""

from random import Random

from tests.fuzz.case import STEPS, WORLD_SIZES, Case, Layout, Problem, sequence_multiple
from tests.fuzz.data import CORPORA

# Share of layouts that ignores every constraint.
RECKLESS = 0.05


def draw_problem(rng: Random) -> Problem:
    """A model, data and training."""
    bf16 = rng.random() < 0.15
    experts = rng.choice((2, 3, 4, 4, 6, 8))
    # In bf16 a near tie among the router's logits sends a token elsewhere, by chance: all chosen.
    experts = min(experts, 4) if bf16 else experts
    topk = experts if bf16 else rng.randint(1 if rng.random() < 0.05 else 2, min(4, experts))
    packed = rng.random() < 0.35
    seq_length = rng.choice((16, 24, 32, 32, 48, 33, 30))
    load_balancing, aux = "none", 0.0
    if not bf16 and rng.random() < 0.3:
        load_balancing = rng.choice(("aux_loss", "seq_aux_loss"))
        aux = rng.choice((0.01, 0.3))
    freeze = rng.random() < 0.12
    return Problem(
        seed=rng.randrange(10**6),
        num_layers=rng.choice((1, 2, 2, 3, 4, 4, 5)),
        hidden_size=rng.choice((16, 18, 24, 24, 27, 40)),
        num_query_groups=rng.choice((1, 2, 2, 4)),
        heads_per_group=rng.choice((1, 2, 3, 4)),
        head_dim=rng.choice((4, 6, 8, 10, 16)),
        num_experts=experts,
        topk=topk,
        expert_width=rng.choice((8, 20, 24, 33)),
        vocab_size=rng.choice((48, 64, 66, 101)),
        window=rng.choice((1, 3, 6, 16, 17, 64)),
        yarn_original=rng.choice((4, 12, 64)),
        sink_scale=rng.choice((0.0, 4.0, 10.0)),
        seq_length=seq_length,
        corpus=rng.choice([*CORPORA, "mixed"]),
        packed=packed,
        positions=rng.choice(("restart", "restart", "run-on")) if packed else "restart",
        eod_mask_loss=rng.random() < 0.3,
        dtype="bf16" if bf16 else "fp32",
        micro_batch_size=1 if packed else rng.choice((1, 1, 2)),
        global_batch_size=rng.choice((4, 8, 8)),
        per_token_loss=rng.random() < 0.3,
        load_balancing=load_balancing,
        aux_loss_coeff=aux,
        z_loss_coeff=0.01 if not bf16 and rng.random() < 0.2 else 0.0,
        router_dtype=rng.choice(("fp32", "fp32", "fp64")),
        freeze=(
            (rng.choice(("*.router.*", "embedding.*", "*.softmax_offset", "*.experts.*")),)
            if freeze
            else ()
        ),
        lr_multiplier=(
            (rng.choice(("*.softmax_offset=0.1", "*.mlp.*=0.5", "embedding.*=0")),)
            if not freeze and rng.random() < 0.12
            else ()
        ),
        clip_grad=rng.choice((1.0, 1.0, 0.01, 100.0, 0.0)),
        weight_decay=rng.choice((0.0, 0.1, 0.1)),
        decay_style=rng.choice(("cosine", "linear", "constant", "WSD")),
        warmup=rng.choice((0, 1)),
    )


def draw_layout(rng: Random, problem: Problem, world_sizes=WORLD_SIZES) -> Layout:
    """A layout of the problem over at most the largest of `world_sizes` ranks."""
    reckless = rng.random() < RECKLESS
    for _ in range(200):
        layout = _draw(rng, problem, rng.choice(world_sizes))
        if reckless or fits(problem, layout):
            return layout
    return Layout()


def _draw(rng: Random, problem: Problem, world_size: int) -> Layout:
    sizes = {"tp": 1, "pp": 1, "cp": 1, "dp": 1}
    left = world_size
    while left > 1:
        sizes[rng.choice(list(sizes))] *= 2
        left //= 2
    tp, pp, cp, dp = sizes.values()
    etp = rng.choice((1, tp))
    ep = rng.choice([n for n in (1, 2, 3, 4, 8) if n <= tp * cp * dp])
    vpp, stages = 1, ""
    if pp > 1:
        vpp = rng.choice((1, 1, 2))
        if rng.random() < 0.35:
            stages = _stages(rng, problem.num_layers, pp * vpp)
    distributed = rng.random() < 0.6
    overlap = rng.random() < 0.4
    micro = 0
    if not problem.packed and not problem.mean_of_micro_batches:
        micro = rng.choice((0, 0, 1, 2))
    grouped = rng.random() < 0.7
    buckets = rng.choice((0, 0, 2, 3, 7))
    policies = [
        "",
        "",
        "--memory experts",
        "--memory lean",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        *(["--memory balanced"] if grouped else []),
    ]
    return Layout(
        tp=tp,
        sequence_parallel=tp > 1 and rng.random() < 0.7,
        pp=pp,
        vpp=vpp,
        stages=stages,
        cp=cp,
        cp_comm=_comm(rng, problem, cp) if cp > 1 else "auto",
        ep=ep,
        etp=etp,
        dp=dp,
        micro_batch_size=micro,
        distributed_optimizer=distributed,
        buckets=buckets,
        bucket_size=0 if buckets and rng.random() < 0.95 else rng.choice((0, 0, 100, 5000)),
        overlap_grad_reduce=overlap,
        overlap_param_gather=distributed and overlap and rng.random() < 0.6,
        grad_reduce_in_bf16=problem.dtype == "bf16" and rng.random() < 0.3,
        grouped=grouped,
        dispatcher=rng.choice(("alltoall", "alltoall", "allgather")),
        recompute=rng.choice(policies),
        loss_chunk=rng.choice((0, 7, 16)),
        async_save=rng.random() < 0.25,
    )


def _comm(rng: Random, problem: Problem, cp: int) -> str:
    schemes = ["auto", "p2p", "all_gather", "a2a", *(["a2a+p2p"] if cp > 2 else [])]
    if rng.random() < 0.25:  # each layer its own
        return " ".join(rng.choice(schemes) for _ in range(problem.num_layers))
    return rng.choice(schemes)


def _stages(rng: Random, num_layers: int, num_stages: int) -> str:
    """Assign layers to stages at random; a stage may have none."""
    cuts = sorted(rng.randint(0, num_layers) for _ in range(num_stages - 1))
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, num_layers])]
    words = ["t" * count for count in counts]
    words[0] = "E" + words[0]
    words[-1] += "L"
    return "|".join(words)


def fits(problem: Problem, layout: Layout) -> bool:
    """Whether the sizes are divisible as Megatron requires."""
    tp, pp, cp, dp = layout.tp, layout.pp, layout.cp, layout.dp
    micro = layout.micro_batch_size or problem.micro_batch_size
    batches, rest = divmod(problem.global_batch_size, micro * dp)
    heads = {"a2a": tp * cp, "a2a+p2p": tp * 2}
    return not (
        rest
        or problem.num_query_groups % tp
        or problem.vocab_size % tp
        or problem.seq_length % sequence_multiple(layout)
        or (layout.sequence_parallel and problem.seq_length % (cp * tp))
        or any(problem.num_heads % heads[name] for name in layout.cp_comm.split() if name in heads)
        or problem.num_experts % layout.ep
        or problem.expert_width % layout.etp
        or (tp * cp * dp) % (layout.ep * layout.etp)
        or (not layout.stages and problem.num_layers % (pp * layout.vpp))
        or (layout.stages and not _stages_fit(layout))
        or (layout.vpp > 1 and batches % pp)
    )


def _stages_fit(layout: Layout) -> bool:
    return all("t" in stage for stage in layout.stages.split("|"))


def draw_cases(rng: Random, count: int, world_sizes=WORLD_SIZES) -> list[Case]:
    """Draw several cases of one problem, which share its reference."""
    problem = draw_problem(rng)
    cases = []
    for _ in range(count):
        layout = draw_layout(rng, problem, world_sizes)
        save_at, resumed = 0, None
        if rng.random() < 0.4:
            save_at = rng.randrange(1, STEPS)
            resumed = layout if rng.random() < 0.3 else draw_layout(rng, problem, world_sizes)
        cases.append(Case(problem, layout, save_at, resumed))
    return cases
