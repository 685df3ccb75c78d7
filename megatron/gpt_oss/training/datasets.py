# Copyright (c) 2026, the megatron-core gptoss authors.
"""Training, validation and test sets from Megatron's indexed datasets."""

from argparse import Namespace
from functools import partial

import torch

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.gpt_oss.data.blend import without_unread
from megatron.gpt_oss.data.eod import DatasetTokenizer, document_end_of
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration for these arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        blend_per_split = [without_unread(blend) for blend in blend_per_split]
    blend = without_unread(blend)
    prefixes = [prefix for part in (blend, *(blend_per_split or ())) if part for prefix in part[0]]
    local = [prefix for prefix in prefixes if "://" not in prefix]
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        # A set of a corpus is evaluated whole, though it ends in half a sequence.
        drop_last_partial_validation_sequence=not args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=DatasetTokenizer(build_tokenizer(args), document_end_of(local)),
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


class FixedSamples(torch.utils.data.Dataset):
    """The same samples for every evaluation, so that losses of different steps can be compared.

    Args:
        dataset: one epoch of a validation set.
        per_evaluation: samples that an evaluation draws.
        num_samples: samples of all evaluations.
    """

    index_split = Split.valid  # tells the data loader which batch size

    def __init__(self, dataset: GPTDataset, per_evaluation: int, num_samples: int):
        if len(dataset) == 0:
            raise ValueError(
                f"The validation set {dataset.dataset_path} has fewer than two tokens. Hold out "
                "more documents, or set validation: false for this corpus."
            )
        self._dataset, self._per_evaluation = dataset, per_evaluation
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict:
        # A set with fewer samples than an evaluation draws is gone through again.
        return self._dataset[index % self._per_evaluation % len(self._dataset)]


def provide_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Megatron's train_valid_test_datasets_provider.

    Args:
        num_samples: samples wanted of the training, validation and test set.
    Returns:
        Training, validation and test set; with --multiple-validation-sets a list of validation
        sets, each of `num_samples[1]` samples (unless --full-validation asks for all).
    """
    args = get_args()
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    is_built = partial(_is_built_here, vp_stage)
    each_its_own = args.multiple_validation_sets and not args.full_validation
    wanted = list(num_samples)
    if each_its_own:
        wanted[Split.valid.value] = None  # one epoch of each
    config = dataset_config(args)
    leave_out_undrawn(config, num_samples)
    builder = BlendedMegatronDatasetBuilder(dataset_class, wanted, is_built, config)
    train, valid, test = builder.build()
    if valid is None and args.eval_iters and is_built():
        raise ValueError(
            f"There is no validation set, and --eval-iters is {args.eval_iters}. Give "
            "--eval-iters 0, or hold documents out (gptoss tokenize --validation-share, or "
            "--split)."
        )
    if each_its_own:
        valid = [
            dataset and FixedSamples(dataset, _samples_per_evaluation(args), num_samples[1])
            for dataset in (valid if isinstance(valid, list) else [valid])
        ]
    return train, valid, test


def leave_out_undrawn(config: GPTDatasetConfig, num_samples: list[int | None]) -> None:
    """Build no set of which no sample is wanted: it may have no document, and needs none.

    Args:
        config: whose split of the documents is changed.
        num_samples: of the training, validation and test set; None is a whole epoch.
    """
    if config.split_matrix is not None:
        config.split_matrix = [
            None if wanted == 0 else part for wanted, part in zip(num_samples, config.split_matrix)
        ]


def _samples_per_evaluation(args: Namespace) -> int:
    return args.eval_iters * args.eval_global_batch_size


# Megatron builds the sets on every rank then, and asks _is_built_here.
provide_datasets.is_distributed = True
