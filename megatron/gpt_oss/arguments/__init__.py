# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of a run.

parse.py        preset, recipe and flags to one RunSpec (run_spec.py), which everything else reads
flags.py        our own flags and defaults; help.py prints --help
ledger.py       each of Megatron's flags: supported, inert, or refused (check_flags.py refuses)
validate_*.py   what is refused before a process group exists: sequence, run length, data
recipe.py       --recipe FILE; foreign_names.py: names from NeMo and Hugging Face
recompute.py    --memory; te_requirements.py, expert_overlap.py: what these features need
"""
