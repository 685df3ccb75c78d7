#!/usr/bin/env bash
# Copyright (c) 2026, the megatron-core gptoss authors.
#
# All steps with a tiny model: create a Hugging Face gpt-oss, tokenize text, continue its
# pre-training, export it to Hugging Face. Needs no GPU. Rerun it to resume.
#
#   examples/gpt_oss/train_tiny.sh [DIR [STEPS [FLAG ...]]]      (default: runs/tiny 120)
#
# FLAGs are passed to pretrain_gpt_oss.py, for example --bf16 on a GPU.
set -euo pipefail

run=${1:-runs/tiny}
steps=${2:-120}
shift $(($# < 2 ? $# : 2))
here=$(cd "$(dirname "$0")/../.." && pwd)
# One rank uses all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
mkdir -p "$run"

# 1. A tiny random model in Hugging Face's format.
[ -f "$run/init/config.json" ] || gptoss init-tiny "$run/init"

# 2. Text that every machine has: Python's standard library.
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
[ -f "$run/data/stdlib.idx" ] || gptoss tokenize "$stdlib" --pattern '*.py' \
    --exclude '*/site-packages/*' --tokenizer "$run/init" --output "$run/data/stdlib"

# 3. Continual pre-training with a checkpoint every 40 steps.
gptoss launch --nproc-per-node 1 --standalone "$here/pretrain_gpt_oss.py" --preset tiny \
    --load-hf "$run/init" --data-path "$run/data/stdlib" --split 98,1,1 --run-dir "$run" \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$steps" \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 \
    --adam-beta2 0.95 --save-interval 40 --eval-interval 40 --eval-iters 2 "$@"

# 4. The loss curve, the trained model in Hugging Face's format, and a sample.
gptoss plot "$run/metrics.jsonl" "$run/loss.png"
gptoss convert to-hf --load "$run/checkpoints" --out "$run/hf" --like "$run/init" --overwrite
gptoss sample "$run/hf" --prompt "def "
