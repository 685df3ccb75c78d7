# Copyright (c) 2026, the megatron-core gptoss authors.

"""Run cases in a pool of ranks and report their faults."""

import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz import compare, data, oracle, rank
from tests.fuzz.case import PLAIN, STEPS, Case, Layout, Problem
from tests.harness.checkpoint_entries import read_checkpoint
from tests.harness.ranks import RankFailure, RankPool

SECONDS_A_RUN = 240.0


@dataclass
class Verdict:
    """How a case ended.

    Attributes:
        kind: 'same', 'refused', 'differs' (numbers), 'failed' (a traceback or a hang).
        lines: the refusal, the differences, or the end of the traceback.
    """

    kind: str
    lines: list[str] = field(default_factory=list)

    @property
    def is_fault(self) -> bool:
        """Whether the verdict is a fault."""
        return self.kind in ("differs", "failed")


class Refused(Exception):
    """A run ended with an error message for the user."""


class Runner:
    """Cases in a pool of ranks; the reference of the last problem is kept.

    Args:
        size: ranks of the pool.
        folder: for data and checkpoints, emptied as it goes.
    """

    def __init__(self, size: int, folder: Path | None = None):
        self._folder = folder or Path(tempfile.mkdtemp(prefix="fuzz"))
        self._pool = RankPool(size)
        self._problem: Problem | None = None
        self._reference: compare.Run | Verdict | None = None

    def close(self) -> None:
        """End the ranks and delete the files."""
        self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def verdict(self, case: Case) -> Verdict:
        """Run a case and compare it with one process and with transformers."""
        try:
            reference = self._reference_of(case.problem)
            if isinstance(reference, Verdict):
                return reference
            return self._compared(case, reference)
        except Refused as refusal:
            return _refusal(str(refusal))
        except RankFailure as failure:
            return Verdict("failed", _end_of(str(failure)))

    def _compared(self, case: Case, reference: compare.Run) -> Verdict:
        run_dir = self._fresh("run")
        interval = case.save_at or STEPS
        run = self._train(case.problem, case.layout, run_dir, f"--save-interval {interval}")
        lines = list(compare.differences(run, reference, case.problem))
        if lines or case.resumed is None:
            return Verdict("differs" if lines else "same", lines)
        _forget_after(run_dir / "checkpoints", case.save_at)
        words = f"--load {run_dir}/checkpoints --save-interval {STEPS}"
        run = self._train(case.problem, case.resumed, self._fresh("resumed"), words)
        lines = list(compare.differences(run, reference, case.problem, first=case.save_at + 1))
        return Verdict("differs" if lines else "same", [f"resumed: {line}" for line in lines])

    def _reference_of(self, problem: Problem) -> compare.Run | Verdict:
        """A run of one process that agrees with transformers, or the reason why there is none."""
        if self._problem == problem:
            return self._reference
        self._problem, self._reference = problem, None
        for name in ("corpus", "hf"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / "corpus").mkdir(parents=True)
        data.write_corpus(self._folder / "corpus" / "data", problem)
        data.write_model(self._folder / "hf", problem)
        try:
            run_dir = self._fresh("reference")
            # Step 1 is saved for its gradients alone.
            reference, batches = self._train(problem, PLAIN, run_dir, "--save-interval 1", True)
            lines = list(self._against_transformers(problem, reference, batches, run_dir))
            self._reference = Verdict("differs", lines) if lines else reference
        except Refused as refusal:
            self._reference = _refusal(str(refusal))
        except RankFailure as failure:
            self._reference = Verdict("failed", _end_of(str(failure)))
        return self._reference

    def _against_transformers(self, problem, reference, batches, run_dir):
        loss, gradients = oracle.first_step(self._folder / "hf", batches, problem)
        tolerance = compare.BF16 if problem.dtype == "bf16" else compare.FP32
        found = reference.steps[0]["losses"]["lm loss"]
        if not abs(found - loss) <= tolerance.loss * max(abs(loss), 1e-6):
            yield f"transformers: loss {found:.7g}, not {loss:.7g}"
        if problem.dtype == "bf16" or problem.aux_loss_coeff or problem.z_loss_coeff:
            return
        tensors = _tensors(run_dir / "checkpoints", 1)
        norm = reference.steps[0]["grad_norm"]
        scale = 0.1  # 1 - beta1
        if problem.clip_grad:
            scale *= min(1.0, problem.clip_grad / (norm + 1e-6))
        prefix = "optimizer.state.exp_avg."
        squares = 0.0
        for key, value in tensors.items():
            if not key.startswith(prefix):
                continue
            wanted = oracle.as_megatron(key.removeprefix(prefix), value, gradients, problem)
            squares += wanted.double().square().sum().item()
            error = compare.tensor_error(value, wanted * scale)
            if not error <= tolerance.tensor:
                yield f"transformers: gradient of {key.removeprefix(prefix)} by {error:.1e}"
        if problem.clip_grad and not abs(norm - squares**0.5) <= tolerance.norm * squares**0.5:
            yield f"transformers: gradient norm {norm:.7g}, not {squares**0.5:.7g}"

    def _train(
        self, problem: Problem, layout: Layout, run_dir: Path, words: str, batches: bool = False
    ):
        argv = [*problem.flags(), *layout.flags(problem), "--run-dir", str(run_dir)]
        argv += ["--load-hf", str(self._folder / "hf")]
        argv += ["--data-path", str(self._folder / "corpus" / "data"), *words.split()]
        records = self._pool.run(
            rank.train,
            argv,
            problem.preset(),
            batches,
            world_size=layout.world_size,
            timeout=SECONDS_A_RUN,
            init_process_group=False,
        )
        if failures := [record.failed for record in records if record.failed]:
            # What the others say of the lost rank comes later, and is longer.
            raise RankFailure(min(failures, key=lambda text: ("Connection" in text, len(text))))
        refusals = [record.refused for record in records]
        if any(refusals):
            if not all(refusals):
                raise RankFailure(f"Some ranks refuse, others train: {refusals}")
            raise Refused(refusals[0])
        run = compare.run_of(records, _tensors(run_dir / "checkpoints", STEPS))
        return (run, records[0].batches) if batches else run

    def _fresh(self, name: str) -> Path:
        path = self._folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def _tensors(checkpoints: Path, step: int) -> dict:
    return compare.normalised(read_checkpoint(str(checkpoints / f"iter_{step:07d}")))


def _forget_after(checkpoints: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had been killed after this one."""
    for path in checkpoints.glob("iter_*"):
        if int(path.name.removeprefix("iter_")) > step:
            shutil.rmtree(path)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def _refusal(sentence: str) -> Verdict:
    """Check that the error message is one informative sentence."""
    if "\n" in sentence.strip() or "Traceback" in sentence or len(sentence) < 20:
        return Verdict("failed", ["not a sentence: " + sentence[:300]])
    return Verdict("refused", [sentence])


def _end_of(failure: str) -> list[str]:
    lines = [line.rstrip() for line in failure.splitlines() if line.strip()]
    frames = [line.strip() for line in lines if re.match(r'\s+File ".*megatron', line)]
    errors = [line for line in lines if re.match(r"\S*(Error|Exception|Warning)\b", line)]
    return [*(errors[:2] or lines[:3]), *(frame.split("/megatron/")[-1] for frame in frames[-2:])]
