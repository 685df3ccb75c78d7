# Copyright (c) 2026, the megatron-core gptoss authors.

"""Inject faults into a run of two ranks at random times, and restart it with the same command.

    python -m tests.soak --faults 100 --seed 7         # `make soak N=100 SEED=7`

What has to hold: after each fault no process is left within 20 s, the next start loses at most the
steps of a save interval (two where the newest checkpoint was damaged), and the run ends with
the losses and the checkpoint of one that nothing happened to, bit for bit. Exit code 1 if not.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from random import SystemRandom

import torch

from benchmarks.lib.report import machine
from megatron.gpt_oss.checkpoint.torch_dist.reader import find_iteration
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from tests.harness import runs
from tests.harness.checkpoint_entries import read_checkpoint
from tests.soak import faults
from tests.soak.attempt import Attempt, SoakError, kill_all
from tests.soak.disk import Disk

SAVE_INTERVAL = 5
STEPS_A_FAULT = 12
# Some faults come before a start has made its first step.
AT_ONCE = 0.15
_SIZES = "--expert-model-parallel-size 2 --use-distributed-optimizer --num-workers 1"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", default=None, help="Of the draws; a random one by default.")
    parser.add_argument("--kinds", nargs="+", default=None, help="Faults by name; all by default.")
    parser.add_argument("--stop-seconds", type=float, default=60.0, help="Of a rank with SIGSTOP.")
    parser.add_argument("--most-steps", type=float, default=2.5, help="Seconds between faults.")
    parser.add_argument("--flags", default="", help="More flags of pretrain_gpt_oss.py.")
    parser.add_argument("--json", type=Path, default=None, help="Write the figures there.")
    options = parser.parse_args()
    options.seed = options.seed or str(SystemRandom().randrange(10**6))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    disk = Disk(folder / "disk")
    print(f"{options.faults} faults, seed {options.seed}, disk: {disk.kind}", flush=True)
    try:
        figures = Soak(folder, disk, options).all()
    except SoakError as error:
        print(f"FAULT: {error}\nkept: {folder}", flush=True)
        return 1
    finally:
        kill_all(folder)
    disk.close()
    shutil.rmtree(folder)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.json is not None:
        command = f"python -m tests.soak --faults {options.faults} --seed {options.seed}"
        if options.flags:
            command += f" --flags='{options.flags}'"
        facts = {"command": command, "machine": machine("torch"), **figures}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


class Soak:
    """A run without faults, the run with faults, and their common inputs."""

    def __init__(self, folder: Path, disk: Disk, options: argparse.Namespace):
        self._folder, self._disk, self._options = folder, disk, options
        self._draw = random.Random(options.seed)
        kinds = [
            kind for kind in faults.FAULTS if kind.__name__ in (options.kinds or [kind.__name__])
        ]
        # Each kind as often as any other.
        self._kinds = [kinds[index % len(kinds)] for index in range(options.faults)]
        self._draw.shuffle(self._kinds)
        self._inputs = runs.write_inputs(folder)
        self._steps = STEPS_A_FAULT * options.faults + 20
        # What the start before had logged, and how much of it the next may lose.
        self._owed: tuple[int, int] | None = None
        self._lost: list[int] = []

    def _start(self, run_dir: Path, name: str) -> Attempt:
        flags = f"--train-iters {self._steps} --save-interval {SAVE_INTERVAL} --eval-interval 1000"
        flags += f" --keep-checkpoints 3 --lr-decay-style constant {_SIZES} {self._options.flags}"
        flags += " --distributed-timeout-minutes 5"
        words = runs.command(self._inputs, run_dir, flags)
        printed = self._folder / f"{name}.txt"
        return Attempt(words, run_dir, self._disk, printed, self._options.stop_seconds)

    def all(self) -> dict:
        """Figures of the soak.

        Raises:
            SoakError: something that is promised does not hold.
        """
        whole = self._folder / "undisturbed"
        start = time.monotonic()
        undisturbed = self._start(whole, "undisturbed")
        undisturbed.wait_until_gone()
        seconds_undisturbed = time.monotonic() - start
        if undisturbed.status:
            raise SoakError(f"the undisturbed run failed: {undisturbed.output()[-2000:]}")
        hurt = self._disk.folder / "run"
        start = time.monotonic()
        events = self._disturbed(hurt)
        seconds = time.monotonic() - start
        self._compare(whole, hurt)
        return {
            "faults": len(events),
            "by_kind": {
                kind.__name__: sum(event["kind"] == kind.__name__ for event in events)
                for kind in faults.FAULTS
            },
            "steps": self._steps,
            "save_interval": SAVE_INTERVAL,
            "steps_lost_most": max(self._lost, default=0),
            "steps_lost_all": sum(self._lost),
            "seconds_until_gone_most": max(event.get("seconds_until_gone", 0) for event in events),
            "seconds": round(seconds, 1),
            "seconds_undisturbed": round(seconds_undisturbed, 1),
            "effective_share": round(seconds_undisturbed / seconds, 3),
            "seconds_a_fault": round((seconds - seconds_undisturbed) / len(events), 2),
            "disk": self._disk.kind,
        }

    def _disturbed(self, run_dir: Path) -> list[dict]:
        """Start, inject a fault, restart; repeat, then train to the end."""
        events: list[dict] = []
        attempt = None
        for number, kind in enumerate(self._kinds):
            if attempt is None:
                attempt = self._start(run_dir, f"start{number}")
                stepped = self._draw.random() > AT_ONCE or kind not in faults.AT_ANY_TIME
                if stepped:
                    self._check_resumed(attempt)
                else:
                    attempt.ranks()
            if attempt.ended():
                raise SoakError(f"a start ended by itself: {attempt.output()[-2000:]}")
            time.sleep(self._draw.uniform(0, self._options.most_steps))
            kind = self._fitting(kind, attempt)
            print(f"{number + 1}: {kind.__name__} after step {attempt.logged()}", flush=True)
            ends = kind(attempt, self._draw)
            events.append({"kind": kind.__name__})
            if not ends:
                continue
            events[-1]["seconds_until_gone"] = round(attempt.wait_until_gone(), 2)
            self._disk.empty()
            if attempt.status == 0:
                raise SoakError(f"status 0 after {kind.__name__}: {attempt.output()[-2000:]}")
            allowed = SAVE_INTERVAL * (2 if kind in faults.COST_A_CHECKPOINT else 1)
            if "--async-save" in self._options.flags:  # the newest may not be complete yet
                allowed += SAVE_INTERVAL
            if stepped:
                self._owed = (attempt.logged(), allowed)
            attempt = None
        attempt = attempt or self._start(run_dir, "last")
        self._check_resumed(attempt)
        attempt.wait_until_gone()
        if attempt.status:
            raise SoakError(f"the last start failed: {attempt.output()[-2000:]}")
        return events

    @staticmethod
    def _fitting(kind, attempt: Attempt):
        """The kind, or a plain kill where there are no two checkpoints yet to take one from."""
        complete = list((attempt.run_dir / "checkpoints").glob("iter_*"))
        if kind in faults.COST_A_CHECKPOINT and len(complete) < 3:
            return faults.rank_killed
        return kind

    def _check_resumed(self, attempt: Attempt) -> None:
        """That this start makes a step, and that no more was lost than may be."""
        if not attempt.wait_for_steps():
            raise SoakError(f"a start failed: {attempt.output()[-3000:]}")
        if self._owed is None:
            return
        (logged, allowed), self._owed = self._owed, None
        _, _, words = attempt.output().partition("resumed at step ")
        resumed = int(words.split()[0]) if words else 0
        self._lost.append(max(0, logged - resumed))
        if self._lost[-1] > allowed:
            raise SoakError(f"step {logged} was logged, and the next start resumed at {resumed}")

    def _compare(self, whole: Path, hurt: Path) -> None:
        losses = [
            {step: record["loss"] for step, record in runs.steps(records).items()}
            for records in (read_metrics(folder / "metrics.jsonl") for folder in (whole, hurt))
        ]
        differing = [step for step, loss in losses[0].items() if losses[1].get(step, loss) != loss]
        if differing or len(losses[1]) < 0.9 * self._steps:
            raise SoakError(
                f"losses of steps {differing[:9]} differ from the undisturbed run's, or steps are "
                f"missing: {len(losses[1])} of {self._steps} are logged"
            )
        checkpoints = [find_iteration(run / "checkpoints") for run in (whole, hurt)]
        undisturbed, resumed = map(_tensors, checkpoints)
        if undisturbed.keys() != resumed.keys() or len(undisturbed) < 20:
            raise SoakError("the last checkpoints hold different tensors")
        for name, tensor in undisturbed.items():
            if not torch.equal(tensor, resumed[name]):
                raise SoakError(f"{name} differs from the undisturbed run's")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    entries = read_checkpoint(str(folder)).items()
    return {name: value for name, value in entries if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    raise SystemExit(main())
