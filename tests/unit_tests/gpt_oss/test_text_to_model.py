# Copyright (c) 2026, the megatron-core gptoss authors.

"""End to end: texts of two languages to a trained Hugging Face directory.

gptoss tokenize, gptoss init-tiny, two ranks of pretrain_gpt_oss.py with context parallel 2 and
packed documents, gptoss convert to-hf; then transformers against the trained Megatron model.
"""

import gzip
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from tests.harness import commands

ROOT = Path(__file__).resolve().parents[3]
STEPS, SEQ_LENGTH, EVAL_SAMPLES = 15, 128, 8
NEW_TOKENS = 16
CORPORA = ("english", "japanese")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the commands make."""
    folder = tmp_path_factory.mktemp("walk")
    write_english(folder / "text" / "english")
    write_japanese(folder / "text" / "japanese")
    call(folder, "gptoss", "init-tiny", "init")
    for corpus in CORPORA:
        call(
            folder,
            *("gptoss", "tokenize", f"text/{corpus}", "--tokenizer", "init"),
            *("--output", f"data/{corpus}", "--validation-share", "0.1", "--split-at", "300"),
            *("--workers", "2", "--bad-lines", "skip"),
        )
    (folder / "data.yaml").write_text("""
corpora:
  english: {path: data/english, weight: 0.4}
  japanese: {path: data/japanese, weight: 0.6, upsample: {300-up: 2}}
  never: {path: data/never, weight: 0}
""")
    (folder / "console.txt").write_text(train(folder, "--save-interval", "1000"))
    call(
        folder,
        "gptoss",
        *"convert to-hf --load run/checkpoints --like init --dtype fp32 --out hf".split(),
    )
    return folder


def write_english(folder):
    """Sentences that every machine has: the docstrings of Python's own library."""
    folder.mkdir(parents=True)
    texts = []
    for file in sorted(Path(json.__file__).parents[1].glob("[a-f]*.py")):
        texts += re.findall(r'"""(.{40,}?)"""', file.read_text(encoding="utf-8"), re.DOTALL)
    lines = [json.dumps({"text": text}) for text in texts[:400]]
    lines.insert(7, '{"text": cut off')
    with gzip.open(folder / "docstrings.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))


def write_japanese(folder):
    """Sentences of a small grammar, one to many a document."""
    folder.mkdir(parents=True)
    choose = random.Random(1).choice
    times, who = ("今日は", "明日は", "昨日は"), ("犬が", "猫が", "先生が", "友達が")
    what, do = ("本を", "水を", "魚を", "歌を"), ("読む。", "飲む。", "食べる。", "歌う。")
    for i in range(150):
        sentences = range(choose((1, 3, 12)))
        text = "".join(choose(times) + choose(who) + choose(what) + choose(do) for _ in sentences)
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}


def call(folder, *words, code=0, ranks=1):
    """Run a command in the directory, as ranks if there are several; returns stdout and stderr."""
    if words[0] == "gptoss":
        words = ("-m", "megatron.gpt_oss.cli", *words[1:])
    command = [sys.executable, *map(str, words)]
    options = dict(cwd=folder, env=environment(), text=True, timeout=600)
    if ranks > 1:
        done = commands.run_ranks(command, ranks, **options)
    else:
        done = [commands.run(command, capture_output=True, **options)]
    printed = "".join(rank.stdout for rank in done) + "".join(rank.stderr for rank in done)
    assert done[0].returncode == code and (code or not any(rank.returncode for rank in done)), (
        printed
    )
    return printed


def train(folder, *flags, code=0, ranks=2):
    words = [ROOT / "pretrain_gpt_oss.py"]
    words += ["--preset", "tiny", "--load-hf", "init", "--data-blend", "data.yaml"]
    words += ["--run-dir", "run", "--context-parallel-size", ranks]
    words += ["--dataloader-inter-document-masking", "--eod-mask-loss", "--num-workers", "0"]
    words += ["--seq-length", SEQ_LENGTH, "--global-batch-size", 4, "--train-iters", STEPS]
    words += ["--lr", "3e-3", "--lr-warmup-iters", 2, "--lr-decay-style", "cosine"]
    words += ["--eval-interval", 5, "--eval-iters", EVAL_SAMPLES // 4]
    return call(folder, *words, *flags, code=code, ranks=ranks)


def evaluations(folder):
    """{set: [loss at each evaluation]}"""
    losses = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "valid_loss" in record:
            losses.setdefault(record["set"].removeprefix("validation "), []).append(record)
    return losses


def test_validation_loss_falls_for_both_languages(folder):
    """On documents that training never saw; a corpus of weight 0 does not even exist."""
    losses = evaluations(folder)
    assert sorted(losses) == sorted(CORPORA)
    for corpus, records in losses.items():
        values = {record["step"]: record["valid_loss"] for record in records}
        assert sorted(values) == [5, 10, STEPS]
        assert values[STEPS] < values[10] < values[5] and values[STEPS] < 0.9 * values[5], values
        assert f"validation {corpus} at step {STEPS}" in (folder / "console.txt").read_text()
        parts = [IndexedDataset(str(prefix)) for prefix in prefixes(folder, corpus)]
        trained, held_out = [{tuple(part[i]) for i in range(len(part))} for part in parts], None
        held_out = trained.pop()
        assert held_out and not held_out & set().union(*trained)


def prefixes(folder, corpus):
    return [folder / "data" / f"{corpus}.{part}" for part in ("0-300", "300-up", "valid")]


def test_what_a_person_is_told(folder):
    console = (folder / "console.txt").read_text()
    for corpus in CORPORA:
        assert re.search(rf"data {corpus}\.0-300: [\d.]+ % of the samples", console)
        assert "exceed the sequence length of 128 and are split" in console
    record = json.loads((folder / "data" / "english.json").read_text())
    (skipped,) = record["skipped"]
    assert "docstrings.jsonl.gz, line 8: not a JSON object" in skipped
    assert (folder / "data" / "english.png").read_bytes().startswith(b"\x89PNG")


def test_logged_loss_is_that_of_transformers(folder):
    """The validation loss of the packed, split sequences, document by document in transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    for corpus in CORPORA:
        total = count = 0
        for sample in validation_samples(folder, corpus):
            ends = sorted(set(sample["cu_seqlens"].tolist()))
            for start, end in zip(ends, ends[1:]):
                with torch.no_grad():
                    logits = model(sample["tokens"][None, start:end]).logits[0]
                losses = F.cross_entropy(logits, sample["labels"][start:end], reduction="none")
                total += (losses * sample["loss_mask"][start:end]).sum().item()
            count += sample["loss_mask"].sum().item()
        logged = evaluations(folder)[corpus][-1]["valid_loss"]
        assert logged == pytest.approx(total / count, rel=1e-5), corpus


def validation_samples(folder, corpus):
    """The samples that an evaluation draws, by Megatron's own dataset."""
    import numpy

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 257, 256, 256, {"class": "test"}

    prefix = str(prefixes(folder, corpus)[-1])
    config = GPTDatasetConfig(
        random_seed=1234,  # --seed
        sequence_length=SEQ_LENGTH,
        blend=([prefix], None),
        split="0,1,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        inter_document_masking=True,
        drop_last_partial_validation_sequence=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    documents = numpy.arange(len(low_level), dtype=numpy.int32)
    dataset = GPTDataset(low_level, prefix, documents, None, Split.valid, config)
    return [dataset[i % len(dataset)] for i in range(EVAL_SAMPLES)]


def test_transformers_writes_what_the_trained_model_writes(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.GptOssForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    written = megatron_tokens(folder, prompts(folder))
    for prompt, expected in zip(prompts(folder), written):
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert found[0].tolist() == expected, bytes(prompt).decode(errors="replace")
    assert len({tuple(row[-NEW_TOKENS:]) for row in written}) > 1


def prompts(folder):
    """The beginnings of held-out documents; they end within words."""
    rows = []
    for corpus in CORPORA:
        held_out = IndexedDataset(str(prefixes(folder, corpus)[-1]))
        rows += [held_out[i][:31].tolist() for i in range(3)]
    return rows


@torch.no_grad()
def megatron_tokens(folder, prompts):
    """Each prompt and the likeliest tokens after it, by the model of the run's own checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.gpt_oss.diagnostics.standalone_model import single_rank_model

    checkpoint = str(folder / "run" / "checkpoints" / f"iter_{STEPS:07}")
    preset = preset_from_hf_config(read_hf_config(folder / "init"))
    rows = []
    with single_rank_model(preset) as model:
        metadata = dist_checkpointing.load_content_metadata(checkpoint)
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        model.load_state_dict(dist_checkpointing.load(wanted, checkpoint)["model"])
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                positions = torch.arange(len(ids)).unsqueeze(0)
                logits = model(torch.tensor([ids]), positions, None)
                ids.append(int(logits[0, -1].argmax()))
            rows.append(ids)
    return rows


@pytest.mark.parametrize("damage, ranks", [("cut", 2), ("other content", 1)])
def test_damaged_index_is_one_sentence(folder, damage, ranks):
    """Before anything is begun, whatever the number of ranks; the index is named."""
    index = folder / "data" / "english.300-up.idx"
    sound = index.read_bytes()
    index.write_bytes(sound[:-10] if damage == "cut" else b"\x89PNG" + sound[4:])
    try:
        output = train(folder, ranks=ranks, code=2)
    finally:
        index.write_bytes(sound)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and index.name in errors[0], output
    assert "gptoss tokenize ... --overwrite" in errors[0]
    assert "Traceback" not in output
