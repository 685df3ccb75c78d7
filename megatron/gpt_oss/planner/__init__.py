# Copyright (c) 2026, the megatron-core gptoss authors.

"""What a run will need, before it runs: memory of the fullest rank and time of a step.

layout.py       sizes, ranks and policies of a run; what Megatron refuses
machines.py     machines of GPUs, and torchrun's words for them
parameters.py   the tensors of a rank's weights
activations.py  the tensors that a layer and the head keep, and those alive at a moment
memory.py       the moments of a step, and the fullest of them
rates.py        measured rates (rates.json), and the command that collects them
time.py         a step on paper
search.py       every sensible layout
table.py        what a person reads, and JSON
command.py      `gptoss plan`; dry_run.py: pretrain_gpt_oss.py --dry-run
"""
