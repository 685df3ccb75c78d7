# Copyright (c) 2026, the megatron-core gptoss authors.

"""Bytes and seconds of one attention layer over 8 to 64 ranks, computed from measured rates.

The compute of one GPU is measured (benchmarks/results/attention_h100.json), the bytes are those
that the code sends, and the link rates are given. How they add up:

all_gather  the all-gather overlaps with the rank's own piece, 1/cp of its work; the reduce-scatter
            of the gradients (fp32) is not overlapped.
p2p         cp equal steps, each as long as its compute or its communication, whichever is longer;
            returning the last sums is not overlapped. Every step reads and writes the partial
            results in fp32.
a2a         no communication is overlapped.
a2a+p2p     all-to-all among the 8 GPUs of a node, always over NVLink; the ring between nodes.
halo        two exchanges, not overlapped.

Communication that is not overlapped adds LATENCY. Copies and merges are counted by the bytes that
they read and write, at MEMORY bytes/s. Assumptions: communication does not slow down computation,
small pieces run at the rate of large ones, and schemes without groups run at the rate of the named
link. This is pessimistic for all_gather over 50 GB/s, where NCCL's rings use all network cards of a
node at once.
"""

import json
from pathlib import Path

from megatron.gpt_oss.training.metrics.flops import visible_pairs

MEASURED = Path(__file__).resolve().parents[1] / "results" / "attention_h100.json"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"

HEADS, GROUPS, DIM, WINDOW = 64, 8, 64, 128
KV = 2 * GROUPS * DIM * 2  # bytes of a token's key and value in bf16; twice that in fp32
Q = HEADS * DIM * 2
NVLINK, NETWORK = 450e9, 50e9
NODE = 8
LATENCY, MEMORY = 20e-6, 2.5e12  # assumed; the card's memory has 3.35e12 on paper
FORWARD, BACKWARD = 2 / 7, 5 / 7
RANKS = (8, 16, 32, 64)
LENGTHS = (131072, 1048576)


def measured(case: str) -> dict:
    """The row of the fastest kernel of a case."""
    rows = json.loads(MEASURED.read_text())["rows"]
    rows = [row for row in rows if row["case"] == case and row["backend"] != "auto"]
    return min(rows, key=lambda row: row["ms"])


def full_layer(tokens: int, cp: int, link: float) -> tuple[float, dict]:
    """Seconds of computation per rank, and (bytes received, total seconds) per scheme."""
    flops = 14 * visible_pairs(tokens, None) * HEADS * DIM / cp
    compute = flops / (measured("causal-128k")["tflops"] * 1e12)
    found = {"all_gather": all_gather(tokens, cp, compute, link)}
    found["p2p"] = ring(tokens / cp, HEADS, GROUPS, cp, compute, link)
    received, seconds = all_to_all(tokens / cp, cp, link)
    found["a2a"] = received, compute + seconds
    if cp > NODE:
        inside, seconds = all_to_all(tokens / cp, NODE, NVLINK)
        nodes = cp // NODE  # each of a node's GPUs has the node's tokens and an eighth of the heads
        between, rest = ring(tokens / nodes, HEADS / NODE, GROUPS / NODE, nodes, compute, link)
        found["a2a+p2p"] = inside + between, seconds + rest
    return compute, found


def all_gather(tokens: int, cp: int, compute: float, link: float) -> tuple[float, float]:
    """Bytes received and seconds: two all-gathers in bf16, one reduce-scatter in fp32."""
    gathered = tokens * KV * (cp - 1) / cp
    seconds = compute * (1 - 1 / cp) + 2 * gathered / link + LATENCY
    for share in FORWARD, BACKWARD:
        seconds += max(share * compute / cp, gathered / link)
    merges = tokens / cp * Q / 2 * 12  # out and dq: two of bf16 read, one written
    copies = tokens * KV / 2 * (2 * 4 + 14)  # put in order twice; sums cleared and added to
    return 4 * gathered, seconds + (merges + copies) / MEMORY


def ring(
    local: float, heads: float, groups: float, ranks: int, compute: float, link: float
) -> tuple[float, float]:
    """Bytes received and seconds: keys take ranks - 1 steps twice, their fp32 gradients ranks steps."""
    q, kv = local * heads * DIM, local * 2 * groups * DIM  # elements
    steps, seconds = ranks - 1, compute / ranks + kv * 4 / link + LATENCY
    # Out, dq and the sums in fp32: read, written, and the part in bf16 read; of q and keys, three
    # quarters on average.
    passes = 10 * 0.75 / MEMORY
    for share, elements, sent in ((FORWARD, q, 2 * kv), (BACKWARD, q + kv, 6 * kv)):
        step = share * compute / ranks + passes * elements
        seconds += steps * max(step, sent / link)
    return 2 * steps * kv * 2 + ranks * kv * 4, seconds + 30 * q / MEMORY  # from bf16 and back


def all_to_all(local: float, ranks: int, link: float) -> tuple[float, float]:
    """Bytes received and seconds: all-to-all of q, k, v and out, then of dout and dq, dk, dv."""
    copies = max(1, ranks // GROUPS)
    moved = 2 * local * (2 * Q + copies * KV)
    received = moved * (ranks - 1) / ranks
    return received, received / link + 4 * LATENCY + 4 * moved / MEMORY  # copied before and after


def window_layer(tokens: int, cp: int, link: float) -> tuple[float, float, float]:
    """Seconds of computation per rank, bytes received, total seconds."""
    row = measured("window-32k")
    compute = row["ms"] / 1e3 * tokens / 32768 / cp
    received = 2 * 2 * (WINDOW - 1) * KV
    return compute, received, compute + 2 * LATENCY + received / link


def plan() -> str:
    """The tables in Markdown."""
    causal, window = measured("causal-128k"), measured("window-32k")
    lines = [
        f"One H100 computes {causal['tflops']:.0f} TFLOP/s in full layers ({causal['kernel']}, "
        f"131,072 tokens) and a windowed layer of 32,768 tokens in {window['ms']:.2f} ms "
        f"({window['kernel']}). A cell has the bytes that a rank receives in forward and backward, "
        "the time of both, and the share of it that is compute.",
    ]
    for tokens in LENGTHS:
        for link in (NVLINK, NETWORK):
            lines += ["", *full_table(tokens, link)]
    lines += ["", *window_table()]
    return "\n".join(lines)


def full_table(tokens: int, link: float) -> list[str]:
    schemes = ("all_gather", "p2p", "a2a", "a2a+p2p")
    rows = [["cp", "tokens/rank", "compute", *schemes, "fastest"]]
    for cp in RANKS:
        compute, found = full_layer(tokens, cp, link)
        cells = [
            (
                f"{mib(found[s][0])}, {ms(found[s][1])}, {compute / found[s][1]:.0%}"
                if s in found
                else "-"
            )
            for s in schemes
        ]
        fastest = min(found, key=lambda scheme: found[scheme][1])
        rows.append([str(cp), f"{tokens // cp:,}", ms(compute), *cells, fastest])
    title = f"Full layer, {tokens:,} tokens, {link / 1e9:.0f} GB/s/GPU"
    if link == NETWORK:
        title += f" ({NVLINK / 1e9:.0f} inside a node for the a2a of a2a+p2p)"
    return [f"**{title}**", "", *markdown(rows)]


def window_table() -> list[str]:
    rows = [["cp", "tokens/rank", "compute", "halo received", "450 GB/s", "50 GB/s"]]
    tokens = LENGTHS[0]
    for cp in RANKS:
        compute, received, fast = window_layer(tokens, cp, NVLINK)
        slow = window_layer(tokens, cp, NETWORK)[2]
        halo = f"{received / 2**20:.2f} MiB"
        rows.append([str(cp), f"{tokens // cp:,}", ms(compute), halo, ms(fast), ms(slow)])
    title = (
        f"Windowed layer ({WINDOW} keys), {tokens:,} tokens, {LATENCY * 1e6:.0f} us per exchange"
    )
    return [f"**{title}**", "", *markdown(rows)]


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def write_plan(path: str) -> None:
    """Put the plan between the marks of a Markdown file; '-' prints it."""
    if path == "-":
        return print(plan())
    target = Path(path)
    text = target.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"--plan {path}: has no lines '{BEGIN}' and '{END}' to write between.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    target.write_text(f"{before}{BEGIN}\n\n{plan()}\n\n{END}{after}")
