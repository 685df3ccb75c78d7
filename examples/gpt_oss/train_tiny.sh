#!/usr/bin/env bash
# Copyright (c) 2026, the megatron-core gptoss authors.
#
# The whole way in small: a Hugging Face gpt-oss, real text, continual pre-training, a trained
# Hugging Face gpt-oss. Needs no GPU. Run it again and it resumes.
#
#   examples/gpt_oss/train_tiny.sh [FOLDER [STEPS [FLAG ...]]]      (default: runs/tiny 120)
#
# FLAGs go to pretrain_gpt_oss.py, for example --bf16 on a GPU.
set -euo pipefail

run=${1:-runs/tiny}
steps=${2:-120}
shift $(($# < 2 ? $# : 2))
here=$(cd "$(dirname "$0")/../.." && pwd)
# One rank computes with every core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
mkdir -p "$run"

# 1. A tiny random model, as a Hugging Face folder.
[ -f "$run/init/config.json" ] || gptoss init-tiny "$run/init"

# 2. Text that every machine has: the running Python's own standard library.
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
[ -f "$run/data/stdlib.idx" ] || gptoss tokenize "$stdlib" --pattern '*.py' \
    --exclude '*/site-packages/*' --tokenizer "$run/init" --output "$run/data/stdlib"

# 3. Continue its pre-training; checkpoints every 40 steps.
gptoss launch --nproc-per-node 1 --standalone "$here/pretrain_gpt_oss.py" --preset tiny \
    --load-hf "$run/init" --data-path "$run/data/stdlib" --split 98,1,1 --run-dir "$run" \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$steps" \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 \
    --adam-beta2 0.95 --save-interval 40 --eval-interval 40 --eval-iters 2 "$@"

# 4. The loss curve, the trained model as a Hugging Face folder, and what it writes.
gptoss plot "$run/metrics.jsonl" "$run/loss.png"
gptoss convert to-hf --load "$run/checkpoints" --out "$run/hf" --like "$run/init" --overwrite
gptoss sample "$run/hf" --prompt "def "
