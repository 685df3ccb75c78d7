# Copyright (c) 2026, the megatron-core gptoss authors.

"""Sample text from a model without a KV cache: each token recomputes the complete prefix.

Slow, but simple and independent of the machine; for short samples of a trained model.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch

from megatron.gpt_oss.checkpoint.hf.config import preset_from_hf_config, read_hf_config
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer, load_text_tokenizer
from megatron.gpt_oss.errors import UsageError

LogitsFn = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def generate(
    logits_of: LogitsFn,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        logits_of: maps token ids [1, s] to logits [1, s, vocabulary].
        tokenizer: encodes and decodes text; its end token ends the sample.
        prompt: the text; if empty, the sample starts a new document.
        max_new_tokens: maximum number of new tokens.
        temperature: 0 selects the most likely token.
        seed: seed of the sampling.
    Returns:
        Prompt and continuation. Ids outside the tokenizer's vocabulary are never sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.end_id]
    for _ in range(max_new_tokens):
        logits = logits_of(torch.tensor([ids]))[0, -1].float().cpu()
        logits = logits[: tokenizer.vocab_size]  # the embedding has more rows than tokens
        if temperature <= 0:
            token = int(logits.argmax())
        else:
            scaled = (logits - logits.max()) / temperature  # no overflow at any temperature
            probabilities = torch.softmax(scaled, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == tokenizer.end_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def gpt_model_logits(model: torch.nn.Module) -> LogitsFn:
    """`logits_of` for a GPTModel (also wrapped) that is not split over ranks."""

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        device = next(model.parameters()).device
        ids = ids.to(device)
        positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)
        return model(ids, positions, None)

    return logits_of


@contextmanager
def open_hf_model(directory: str | Path) -> Iterator[torch.nn.Module]:
    """A GPTModel with the weights of a Hugging Face directory; bf16 on CUDA, fp32 on the CPU.

    Creates a process group of one rank; the process must not have one.
    """
    from megatron.core import device_utils
    from megatron.gpt_oss.checkpoint.load_hf import load_hf
    from megatron.gpt_oss.diagnostics.standalone_model import single_rank_model

    preset = preset_from_hf_config(read_hf_config(Path(directory)))
    with single_rank_model(preset, bf16=device_utils.is_cuda()) as model:
        load_hf([model], directory)
        yield model


def sample_hf(
    directory: str | Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a prompt with the model and tokenizer of a Hugging Face directory."""
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens} generates nothing. Give 1 or more.")
    read_hf_config(Path(directory))  # first, because its errors are more precise
    tokenizer = load_text_tokenizer(directory)
    with open_hf_model(directory) as model:
        logits_of = gpt_model_logits(model)
        return generate(logits_of, tokenizer, prompt, max_new_tokens, temperature, seed)
