# Copyright (c) 2026, the megatron-core gptoss authors.

"""The command line of a run.

parse.py        preset, recipe and flags to one RunSpec (run_spec.py)
flags.py        our own flags and defaults; help.py prints --help
ledger.py       status of each of Megatron's flags; check_flags.py refuses those not supported
validate_*.py   our checks before a process group exists: model, files, data, sequence, run
megatron_validation.py  Megatron's own validation, for a run and for a dry run
recipe.py       --recipe FILE; foreign_names.py: names from NeMo and Hugging Face
recompute.py    --memory; te_requirements.py, expert_overlap.py: requirements of these features
"""
