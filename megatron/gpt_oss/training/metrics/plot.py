# Copyright (c) 2026, the megatron-core gptoss authors.

"""Plot the loss of a run from its metrics.jsonl."""

import io
from pathlib import Path
from typing import Iterable

from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.outputs import check_file, write_file
from megatron.gpt_oss.training.metrics.jsonl import read_metrics
from megatron.gpt_oss.training.metrics.svg_chart import MAX_VALUE

PLOT = "gptoss plot"
_MAX_NAME_LENGTH = 200


def plot_loss(metrics: str | Path, out: str | Path, title: str = "gpt-oss") -> Path:
    """Write the loss curve, with the learning rate below it, as a PNG.

    Args:
        metrics: metrics.jsonl; records with a step and a loss, or a step and a valid_loss. If a
            step has several records (a resumed run), the last one is used.
        out: the PNG; a plot of an earlier call is replaced.
        title: title of the plot.
    Raises:
        UsageError: no record has a loss, matplotlib is not installed, or `out` is another file.
    """
    by_step = {r["step"]: r for r in read_metrics(metrics) if r.get("loss") is not None}
    if not by_step:
        raise UsageError(f"{metrics} has no record with a step and a loss yet.")
    check_plot(out, PLOT, [metrics])
    records = [by_step[step] for step in sorted(by_step)]
    evaluations: dict[str, dict] = {}  # by validation set, by step
    for record in read_metrics(metrics):
        if "valid_loss" in record:
            of_set = evaluations.setdefault(as_title(record.get("set", "validation")), {})
            of_set[record["step"]] = record
    pyplot = import_pyplot()
    has_lr = any("learning_rate" in record for record in records)
    figure, axes = pyplot.subplots(
        2 if has_lr else 1,
        1,
        sharex=True,
        squeeze=False,
        figsize=(8, 5),
        height_ratios=(3, 1) if has_lr else None,
        layout="constrained",
    )
    loss_axis = axes[0, 0]
    _draw(loss_axis, records, "loss", "training")
    for name, of_set in evaluations.items():
        _draw(loss_axis, list(of_set.values()), "valid_loss", name, marker="o")
    first, last = records[0], records[-1]
    loss_axis.set_title(
        f"{as_title(title)}: loss {first['loss']:.3f} at step {first['step']}, "
        f"{last['loss']:.3f} at step {last['step']}"
    )
    loss_axis.set_ylabel("loss (nats/token)")
    loss_axis.grid(alpha=0.3)
    loss_axis.legend()
    if has_lr:
        _draw(axes[1, 0], records, "learning_rate", "learning rate")
        axes[1, 0].set_ylabel("learning rate")
        axes[1, 0].grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    save_plot(figure, out, PLOT)
    pyplot.close(figure)
    return Path(out)


def check_plot(out: str | Path, made_by: str, inputs: Iterable[str | Path] = ()) -> None:
    """Like `check_file`; also rejects a name that does not end in .png."""
    check_file(out, made_by, "The PNG", inputs)
    if Path(out).suffix.lower() not in ("", ".png") and not str(out).startswith("/dev/"):
        raise UsageError(
            f"The plot is written as PNG, but {out} ends in {Path(out).suffix}. Give a .png path."
        )


def save_plot(figure, out: str | Path, made_by: str) -> None:
    """Write a figure as a PNG with the mark of the command."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, format="png", metadata={"Software": made_by})
    write_file(out, stream.getvalue())


def import_pyplot():
    """matplotlib.pyplot, without a display.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "A plot needs matplotlib, which is not installed: pip install 'megatron-core[report]'."
        ) from error
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may have dollar signs
    from matplotlib import pyplot

    return pyplot


def as_title(name: str) -> str:
    """A name that matplotlib draws unchanged.

    matplotlib omits labels that start with an underscore, and takes minutes for a very long text.
    """
    text = "".join(c if c.isprintable() else "\ufffd" for c in name[:_MAX_NAME_LENGTH])
    return f" {text}" if text.startswith("_") or not text else text


def _draw(axis, records: list[dict], key: str, label: str, **style) -> None:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    points = [(step, value) for step, value in points if abs(value) < MAX_VALUE]
    if points:
        axis.plot(*zip(*points), label=label, **style)
