# Copyright (c) 2026, the megatron-core gptoss authors.

"""Memory and time of a run before it starts (docs/planning.md).

layout.py       model, parallel sizes and recomputation of a run
machines.py     machines of GPUs, and the torchrun command for them
parameters.py   number of parameters of a rank
activations.py  tensors that a layer and the head save, and their live bytes in each phase
memory.py       phases of a step, and the peak
rates.py        measured rates (rates.json), and the command that collects them
time.py         time of a step
search.py       search over layouts
table.py        output as text
deprecated.py   old keys of the JSON output
command.py      `gptoss plan`; dry_run.py: pretrain_gpt_oss.py --dry-run
"""
