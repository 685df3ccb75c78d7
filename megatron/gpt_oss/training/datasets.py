# Copyright (c) 2026, the megatron-core gptoss authors.
"""Training, validation and test sets from Megatron's indexed datasets."""

from argparse import Namespace
from functools import partial

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration for these arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _is_built_here(vp_stage: int | None) -> bool:
    """Only where a batch is read: the first and last pipeline stage, on TP rank 0.

    Attention on every stage has to know where documents begin.
    """
    wanted = get_args().dataloader_inter_document_masking or is_first_or_last_pipeline_stage(
        vp_stage
    )
    return mpu.get_tensor_model_parallel_rank() == 0 and wanted


def provide_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Megatron's train_valid_test_datasets_provider.

    Args:
        num_samples: samples wanted of the training, validation and test set.
    """
    args = get_args()
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    is_built = partial(_is_built_here, vp_stage)
    builder = BlendedMegatronDatasetBuilder(
        dataset_class, num_samples, is_built, dataset_config(args)
    )
    return builder.build()


# Megatron builds the sets on every rank then, and asks _is_built_here.
provide_datasets.is_distributed = True
