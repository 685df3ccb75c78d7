# Copyright (c) 2026, the megatron-core gptoss authors.

"""Reference of the learning rate, as a function of the step and the command line.

It shares no code with Megatron's scheduler.
"""

import argparse
import math


def parsed(flags: str) -> argparse.Namespace:
    """The flags of a schedule, among others; the last of several counts."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("lr", "min-lr", "lr-warmup-init", "lr-warmup-fraction"):
        parser.add_argument(f"--{name}", type=float)
    for unit in ("iters", "samples"):
        for name in ("train", "lr-decay", "lr-warmup", "lr-wsd-decay"):
            parser.add_argument(f"--{name}-{unit}", type=int)
    parser.add_argument("--lr-decay-style", default="linear")
    parser.add_argument("--lr-wsd-decay-style", default="exponential")
    return parser.parse_known_args(flags.split())[0]


def rate(flags: str, at: float, batch: int = 1) -> float:
    """The rate of a group with factor 1.

    Args:
        flags: the command line.
        at: iterations that are behind, with --train-iters; samples, with --train-samples.
        batch: samples of an iteration. It takes part in inverse-square-root without warm-up alone,
            which Megatron lets fall from the first sample on, not from the first iteration.
    """
    given = parsed(flags)
    unit = "iters" if given.train_iters else "samples"

    def length(name):
        return getattr(given, f"{name}_{unit}")

    end = length("lr_decay") or length("train")
    fraction = given.lr_warmup_fraction
    warmup = length("lr_warmup") or 0 if fraction is None else fraction * end
    low, high, start = given.min_lr or 0.0, given.lr, given.lr_warmup_init or 0.0
    if warmup and at <= warmup:
        return start + (high - start) * at / warmup
    if given.lr_decay_style == "constant":
        return high
    if at > end:
        return low
    if given.lr_decay_style == "inverse-square-root":
        scale = batch if given.train_iters else 1
        return max(low, high * math.sqrt(max(warmup * scale, 1) / max(at * scale, 1)))
    done = (at - warmup) / (end - warmup)
    if given.lr_decay_style == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    elif given.lr_decay_style == "WSD":
        done = max(0.0, 1 - (end - at) / length("lr_wsd_decay"))
        left = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "exponential": 2 * 0.5**done - 1,
            "minus_sqrt": 1 - math.sqrt(done),
        }[given.lr_wsd_decay_style]
    else:
        left = 1 - done
    return low + (high - low) * left
