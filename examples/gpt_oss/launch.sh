#!/usr/bin/env bash
# Copyright (c) 2026, the megatron-core gptoss authors.
#
# Continual pre-training with a recipe, on the GPUs of this machine:
#
#   examples/gpt_oss/launch.sh RECIPE --load-hf DIR --data-blend FILE --run-dir DIR [FLAG ...]
#
# RECIPE is a file, or the name of one in recipes/ (20b-32k-8gpus). FLAGs are passed to
# pretrain_gpt_oss.py and override the recipe. Environment variables:
#
#   DRY=1             print the command and exit
#   GPUS              processes on this machine; by default one per GPU
#   NODES             machines, 1 by default; for more, run the same command on each of them and set
#   RENDEZVOUS, JOB   HOST:PORT on one of the machines, and a unique job id
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "no recipe. Give a file, or one of: $(cd "$here/recipes" && echo *gpus.txt)"
recipe=$1
shift
[ -f "$recipe" ] || recipe=$here/recipes/${recipe%.txt}.txt
[ -f "$recipe" ] || fail "no recipe $recipe. Available: $(cd "$here/recipes" && echo *gpus.txt)"

nodes=${NODES:-1}
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
# Validated first: bash arithmetic would run the command in NODES='a[$(command)]'.
for number in "NODES=$nodes" "GPUS=$gpus"; do
    [[ $number =~ ^[A-Z]+=(0|[1-9][0-9]{0,4})$ ]] || fail "$number is not a number from 1 to 99999"
done
[ "$nodes" -gt 0 ] || fail "NODES=0: give 1 or more"
[ "$gpus" -gt 0 ] || fail "nvidia-smi lists no GPU. Set the number of processes with GPUS=N."
if [[ $recipe =~ -([0-9]+)gpus\.txt$ ]] && [ "${BASH_REMATCH[1]}" != $((nodes * gpus)) ]; then
    echo "note: $(basename "$recipe") is planned for ${BASH_REMATCH[1]} GPUs, this run has" \
        "$((nodes * gpus)); --dry-run $((nodes * gpus)) shows memory and time" >&2
fi

command=(gptoss launch --nproc-per-node "$gpus")
if [ "$nodes" -gt 1 ]; then
    : "${RENDEZVOUS:?HOST:PORT on one of the machines}" "${JOB:?a unique job id}"
    command+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB")
else
    command+=(--standalone)
fi
command+=("$(dirname "$(dirname "$here")")/pretrain_gpt_oss.py" --recipe "$recipe" "$@")

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
if [ -n "${DRY:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
