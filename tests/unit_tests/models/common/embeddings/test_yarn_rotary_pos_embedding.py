# Copyright (c) 2026, the megatron-core gptoss authors.
"""YaRN's inverse frequencies and attention factor against transformers' own."""

import math
from argparse import Namespace
from itertools import product

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from megatron.core import parallel_state
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

# The same operations in the same order, so a unit or two in the last place of fp32.
RTOL = 2.0**-22
# gpt-oss' own, by the names that TransformerConfig and GPTModel read.
YARN = dict(
    yarn_rotary_scaling_factor=32.0,
    yarn_original_max_position_embeddings=4096,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    yarn_mscale=1.0,
    yarn_mscale_all_dim=0.0,
    yarn_correction_range_round_to_int=False,
)


@pytest.fixture(autouse=True)
def cpu_without_gpu(monkeypatch):
    """Make the CPU the current device if there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def transformers_yarn(
    head_dim=64, theta=150000.0, factor=32.0, original=4096, truncate=False, **rope_parameters
):
    """Inverse frequencies [hn / 2] and attention factor of transformers."""
    config = GptOssConfig(
        head_dim=head_dim,
        max_position_embeddings=int(original * factor),
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=theta,
            factor=factor,
            original_max_position_embeddings=original,
            truncate=truncate,
            **rope_parameters,
        ),
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")


def make_yarn(head_dim=64, theta=150000.0, factor=32.0, original=4096, truncate=False, **kwargs):
    return YarnRotaryEmbedding(
        head_dim,
        rotary_base=theta,
        use_cpu_initialization=True,
        scaling_factor=factor,
        original_max_position_embeddings=original,
        correction_range_round_to_int=truncate,
        **kwargs,
    )


def megatron_yarn(**kwargs):
    """The same from Megatron's embedding: position 1 turns by one inverse frequency."""
    emb, attention_factor = make_yarn(**kwargs).forward(2)
    emb = emb.flatten(1).cpu()
    assert (emb[0] == 0).all()
    first, second = emb[1].chunk(2)
    assert torch.equal(first, second)
    return first, attention_factor


SHAPES = [
    (head_dim, theta, original)
    for head_dim, theta, original in product((32, 64, 80), (10000.0, 150000.0, 1e6), (2048, 4096))
]


@pytest.mark.parametrize("truncate", [False, True], ids=["exact-range", "truncate"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 4.0, 32.0, 64.0])
def test_frequencies(record_property, factor, truncate):
    """Head sizes, bases and original lengths in one test: only the values differ."""
    errors = []
    for head_dim, theta, original in SHAPES:
        given = dict(
            head_dim=head_dim, theta=theta, factor=factor, original=original, truncate=truncate
        )
        inv_freq, attention_factor = megatron_yarn(**given)
        ref, attention_factor_ref = transformers_yarn(**given)
        torch.testing.assert_close(inv_freq, ref, rtol=RTOL, atol=0, msg=lambda m: f"{given}: {m}")
        assert attention_factor == pytest.approx(attention_factor_ref, rel=1e-15), given
        errors.append((inv_freq / ref - 1).abs().max().item())
    case = f"factor {factor:g}, {'truncate' if truncate else 'exact range'}, {len(SHAPES)} shapes"
    record_property("parity", ("YaRN inverse frequencies", case, max(errors), RTOL))


@pytest.mark.parametrize("beta_fast, beta_slow", [(32.0, 1.0), (16.0, 2.0), (1.0, 1.0)])
def test_betas(beta_fast, beta_slow):
    """The last pair of betas gives an empty range."""
    betas = dict(beta_fast=beta_fast, beta_slow=beta_slow)
    inv_freq, _ = megatron_yarn(**betas)
    torch.testing.assert_close(inv_freq, transformers_yarn(**betas)[0], rtol=RTOL, atol=0)


def test_gpt_oss_by_hand():
    """gpt-oss in float64: pairs 8.0928 to 17.3980 of 32 are ramped, factor 0.1 ln(32) + 1."""
    inv_freq, attention_factor = megatron_yarn()
    pair = torch.arange(32, dtype=torch.float64)
    plain = 150000.0 ** (-pair / 32)
    low, high = (
        64 * math.log(4096 / (2 * math.pi * turns)) / (2 * math.log(150000)) for turns in (32, 1)
    )
    assert (low, high) == pytest.approx((8.0928, 17.3980), abs=5e-5)
    ramp = ((pair - low) / (high - low)).clamp(0, 1)
    ref = plain * (1 - ramp) + plain / 32 * ramp
    torch.testing.assert_close(inv_freq.double(), ref, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(1.3465735902799727, rel=1e-15)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.5, 1.0, None], ids=lambda v: f"all-dim-{v}")
@pytest.mark.parametrize("mscale", [0.0, 0.707, 1.0, None], ids=lambda v: f"mscale-{v}")
def test_attention_factor(mscale, mscale_all_dim, factor):
    """A zero mscale or mscale_all_dim was taken as given: 1.2450 for 1.3466 at 0.707, 0 and 32."""
    given = dict(mscale=mscale, mscale_all_dim=mscale_all_dim)
    _, ref = transformers_yarn(factor=factor, **given)
    assert megatron_yarn(factor=factor, **given)[1] == pytest.approx(ref, rel=1e-15)
    config = Namespace(
        yarn_rotary_scaling_factor=factor, yarn_mscale=mscale, yarn_mscale_all_dim=mscale_all_dim
    )
    layer = yarn._yarn_get_concentration_factor_from_config(config)
    assert layer == pytest.approx(ref, rel=1e-15)


def yarn_args(**kwargs):
    """The command line's values that describe gpt-oss' YaRN."""
    return Namespace(
        **dict(
            position_embedding_type="yarn",
            multi_latent_attention=False,
            rotary_scaling_factor=32.0,
            yarn_original_max_position_embeddings=None,
            yarn_beta_fast=None,
            yarn_beta_slow=None,
            mscale=1.0,
            mscale_all_dim=0.0,
            yarn_correction_range_round_to_int=False,
            yarn_attention_factor=None,
        )
        | kwargs
    )


@pytest.mark.parametrize("attention_factor", [None, 1.0, 1.75])
def test_explicit_attention_factor(attention_factor):
    """Regression: attention_factor of transformers had no flag; embedding and layers need it."""
    _, ref = transformers_yarn(attention_factor=attention_factor)
    config = Namespace(**YARN, yarn_attention_factor=attention_factor)
    layer = yarn._yarn_get_concentration_factor_from_config(config)
    assert layer == pytest.approx(ref, rel=1e-15)
    assert megatron_yarn(attention_factor=attention_factor)[1] == pytest.approx(ref, rel=1e-15)


def test_flags():
    """The command line sets what the layers and the embedding read."""
    from megatron.training.argument_utils import _apply_yarn_config_from_args

    config = Namespace()
    _apply_yarn_config_from_args(config, yarn_args(yarn_attention_factor=1.75))
    assert vars(config) == {**YARN, "yarn_attention_factor": 1.75}


@pytest.mark.parametrize("rotary_percent", [1.0, 0.5, 0.25])
def test_rotary_percent(rotary_percent):
    """Regression: rotary_percent was ignored, and the complete head was rotated."""
    ref, _ = transformers_yarn(partial_rotary_factor=rotary_percent)
    inv_freq, _ = megatron_yarn(rotary_percent=rotary_percent)
    torch.testing.assert_close(inv_freq, ref, rtol=RTOL, atol=0)


def test_interpolation_factor_is_refused():
    """Regression: seq_len_interpolation_factor was silently ignored."""
    with pytest.raises(ValueError, match="would ignore seq_len_interpolation_factor=2.0"):
        make_yarn(seq_len_interpolation_factor=2.0)
    make_yarn(seq_len_interpolation_factor=None)


class Group:
    """The attributes of a process group that model construction and position slices use."""

    def __init__(self, size, rank):
        self.size, self.rank = lambda: size, lambda: rank


def slice_on_cpu(pos_emb, seq_dim, cp_group):
    """get_pos_emb_on_this_cp_rank without a GPU: chunks r and 2 cp - 1 - r of 2 cp."""
    assert seq_dim == 0
    chunks = pos_emb.chunk(2 * cp_group.size())
    return torch.cat((chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]))


def test_model_cp_group(monkeypatch):
    """GPTModel left its CP group out, so YaRN sliced positions by the global one (here: none)."""
    monkeypatch.setattr(yarn, "get_pos_emb_on_this_cp_rank", slice_on_cpu)
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda **_: None)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True
    )
    vars(config).update(YARN)
    groups = ProcessGroupCollection()
    groups.cp = Group(2, 1)
    for name in ("tp", "pp", "embd", "dp", "dp_cp", "expt_tp", "ep", "expt_dp"):
        setattr(groups, name, Group(1, 0))
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="yarn",
        rotary_base=150000,
        pg_collection=groups,
    )
    emb, attention_factor = model.rotary_pos_emb(16, packed_seq=False)
    inv_freq, attention_factor_ref = transformers_yarn(head_dim=16)
    positions = torch.tensor([4, 5, 6, 7, 8, 9, 10, 11])
    half = emb.flatten(1)[:, :8].cpu()
    torch.testing.assert_close(half, torch.outer(positions, inv_freq), rtol=RTOL, atol=0)
    assert attention_factor == pytest.approx(attention_factor_ref, rel=1e-15)


@pytest.mark.parametrize("size, rank", [(2, 0), (2, 1), (3, 2)])
def test_cached_cos_sin_under_cp(size, rank):
    """A rank's chunks of a long cached table were cut short: positions of another length.

    At cp 3 the model was not even built: the first table has 4096 positions, no multiple of 6.
    """
    group = Namespace(size=lambda: size, rank=lambda: rank)
    whole, mine = make_yarn(), make_yarn(cp_group=group)
    chunks = torch.arange(24).view(2 * size, -1)
    positions = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
    for packed in (False, True, False):
        for got, expected in zip(
            mine.get_cached_cos_sin(24, packed_seq=packed), whole.get_cached_cos_sin(24)
        ):
            assert torch.equal(got, expected if packed else expected[positions])
