# Copyright (c) 2026, the megatron-core gptoss authors.

"""Upstream's pretrain() on a tiny gpt-oss, as pretrain_gpt.py calls it; the parallel tests run it.

The model is Megatron's GPTModel with MoE layers from the local spec, and the data a random indexed
dataset that write_random_dataset() makes: 32 documents of uneven length.
"""

import pathlib
import sys
import time
from functools import partial

import numpy
import torch

from megatron.core import mpu
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from megatron.gpt_oss.training import forward_step as step
from megatron.gpt_oss.training.datasets import provide_datasets
from megatron.training import get_args, pretrain, set_startup_timestamps, step_callbacks
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.initialize import initialize_megatron

VOCAB_SIZE = 96
SEQ_LENGTH = 32

# Sizes are small and unequal (hidden, heads x head size, expert width) so that a swapped dimension
# does not fit by accident; the flags are those that describe gpt-oss to upstream.
MODEL_FLAGS = (
    "--num-layers 4 --hidden-size 48 --ffn-hidden-size 40 --num-attention-heads 4 --kv-channels 16 "
    "--group-query-attention --num-query-groups 2 --max-position-embeddings 64 "
    f"--seq-length {SEQ_LENGTH} --window-size 7,0 --window-attn-skip-freq 2 "
    "--position-embedding-type yarn --rotary-base 150000 --rotary-scaling-factor 32 "
    "--yarn-original-max-position-embeddings 4096 --yarn-beta-fast 32 --yarn-beta-slow 1 "
    "--no-yarn-correction-range-round-to-int --mscale 1 --mscale-all-dim 0 "
    "--normalization RMSNorm --norm-epsilon 1e-5 "
    "--quick-geglu --glu-linear-offset 1 --activation-func-clamp-value 7 --untie-embeddings-and-output-weights "
    "--num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 40 --moe-router-score-function softmax "
    "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-router-dtype fp32 "
    "--attention-dropout 0 --hidden-dropout 0 --softmax-type learnable "
    f"--vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 8 --tokenizer-type NullTokenizer"
).split()

# Two layers are one of each kind of attention, and four experts are two on each of two ranks: enough
# for all but virtual pipeline stages, at a quarter of the kernels, collectives and saved tensors.
SMALL = "--num-layers 2 --num-experts 4 --moe-router-topk 2"

RUN_FLAGS = (
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion "
    "--no-rope-fusion --attention-softmax-in-fp32 --use-cpu-initialization "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine "
    "--lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234 "
    "--num-workers 0 --log-interval 1 --distributed-timeout-minutes 1 "
    "--split 90,10,0 --eval-iters 1 --eval-interval 1000 --ckpt-format torch_dist"
).split()


def write_random_dataset(prefix: str, seed: int = 0) -> str:
    """Write a Megatron indexed dataset of random tokens; returns the prefix for --data-path."""
    generator = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for _ in range(32):
        # A skewed distribution, so that there is something to learn in ten steps.
        tokens = (VOCAB_SIZE * generator.random(generator.integers(20, 200)) ** 3).astype(int)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(prefix + ".idx")
    return prefix


def forward_step(data_iterator, model):
    """One micro-batch, as pretrain_gpt_oss.py takes it."""
    batch = step.get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch["packed_seq_params"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask, output):
    """A name of its own, for tests that put another in its place."""
    return step.loss_func(
        loss_mask,
        output,
        cp_group=mpu.get_context_parallel_group(),
        per_token=get_args().calculate_per_token_loss,
    )


def parse(flags, data_prefix: str, model_flags=MODEL_FLAGS):
    """Upstream's parser reads sys.argv; later flags override earlier ones."""
    sys.argv = ["tiny_pretrain", *model_flags, *RUN_FLAGS, "--data-path", data_prefix, *flags]
    return parse_and_validate_args()


def write_initial_checkpoint(flags, data_prefix: str, directory: str, model_flags=MODEL_FLAGS):
    """Write a model-only torch_dist checkpoint in which no parameter is zero or one.

    Biases and sinks start at zero and norms at one: a sharded run that mixes them up or counts
    their gradients twice would look right for a while.
    """
    flags = [
        *flags,
        "--save",
        directory,
        "--save-interval",
        "1",
        "--no-save-optim",
        "--no-save-rng",
    ]
    args = parse(flags, data_prefix, model_flags)
    initialize_megatron()
    config = gpt_config_from_args(args)
    model = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model[0].named_parameters():
            if name.endswith(("bias", "softmax_offset")) or "norm" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter), alpha=2.0 if "softmax" in name else 0.3)
    save_checkpoint(1, model, None, None, 0)


def run_pretrain(flags, data_prefix: str, model_flags=MODEL_FLAGS, silent: bool = False) -> dict:
    """Train with upstream's own loop; returns what this rank's callbacks received."""
    received = {"steps": [], "evaluations": [], "checkpoints": []}
    step_callbacks.clear()

    def checkpoint_saved(event):
        tracker = pathlib.Path(event.save_dir, "latest_checkpointed_iteration.txt")
        received["checkpoints"].append({**vars(event), "tracker": tracker.read_text()})

    step_callbacks.subscribe(
        step_callbacks.TrainingLogged, lambda event: received["steps"].append(vars(event))
    )
    step_callbacks.subscribe(
        step_callbacks.SetEvaluated, lambda event: received["evaluations"].append(vars(event))
    )
    step_callbacks.subscribe(step_callbacks.CheckpointSaved, checkpoint_saved)
    step_callbacks.silence_upstream_log(silent)
    args = parse(flags, data_prefix, model_flags)
    # As entry scripts do; each rank must, or the ranks do not agree on an all-reduce of these.
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        provide_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    return received
