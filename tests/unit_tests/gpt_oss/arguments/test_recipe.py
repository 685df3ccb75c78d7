# Copyright (c) 2026, the megatron-core gptoss authors.

"""--recipe: a file's flags under those of the command line; mistakes name the file."""

import pytest

from megatron.gpt_oss.arguments.parse import read
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.training.pretrain import main


def test_words_of_a_recipe(tmp_path):
    (tmp_path / "base.txt").write_text("--lr 1e-5\n--clip-grad 0.5 # why\n")
    file = tmp_path / "one.txt"
    file.write_text(
        "# title\n--preset tiny\n--recipe base.txt\n\n--lr 2e-5\n--freeze '*.r o.*' b\n"
    )
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]
    given = [*null, "--lr", "3e-5", "--recipe", str(file), "--recipe", str(tmp_path / "base.txt")]
    spec = read(given)
    assert list(spec.words) == [
        *("--lr", "1e-5", "--clip-grad", "0.5"),
        *("--preset", "tiny", "--lr", "2e-5", "--freeze", "*.r o.*", "b"),
        *("--lr", "1e-5", "--clip-grad", "0.5"),
        *given,
    ]
    assert (spec.args.lr, spec.args.clip_grad) == (3e-5, 0.5)
    assert list(read(["--preset", "tiny", *null]).words) == ["--preset", "tiny", *null]


@pytest.mark.parametrize(
    "text, words",
    [
        ("--seq-lenght 5", ["one.txt", "--seq-lenght", "--seq-length"]),
        ("--seq-length many", ["one.txt", "--seq-length", "many"]),
        ("--preset tiny\nstray", ["one.txt", "stray"]),
        ("--preset tiny\n--freeze '*.r", ["one.txt, line 2", "quotation"]),
        ("--preset tiny \\\n--lr 1", ["one.txt, line 1", "\\"]),
        ("--recipe one.txt", ["one.txt includes itself"]),
        ("--recipe gone.txt", ["gone.txt", "No such file"]),
        ("--recipe", ["one.txt", "--recipe", "expected"]),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, words):
    """One sentence, before anything is made."""
    file = tmp_path / "one.txt"
    file.write_text(text + "\n")
    with pytest.raises(UsageError) as error:
        main(["--recipe", str(file), "--run-dir", str(tmp_path / "run")])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
