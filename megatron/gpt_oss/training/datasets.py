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
from megatron.gpt_oss.data.indexed_dataset import has_loss_weights
from megatron.gpt_oss.training.chat_dataset import ChatDataset, ChatDatasetConfig
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration from the arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        blend_per_split = [without_unread(blend) for blend in blend_per_split]
    blend = without_unread(blend)
    prefixes = [prefix for part in (blend, *(blend_per_split or ())) if part for prefix in part[0]]
    texts = [p for p in prefixes if "://" not in p and not has_loss_weights(p)]
    config_class = (
        partial(ChatDatasetConfig, overlong=args.sft_overlong) if args.sft else GPTDatasetConfig
    )
    return config_class(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        # The validation set of a corpus is evaluated to its end, also with a partial last sequence.
        drop_last_partial_validation_sequence=not args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=DatasetTokenizer(build_tokenizer(args), document_end_of(texts)),
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


def _builds_datasets(vp_stage: int | None) -> bool:
    """Whether this rank reads batches: TP rank 0 of the first and last pipeline stage.

    With --dataloader-inter-document-masking every stage reads them, since attention needs the
    document boundaries.
    """
    reads_batch = get_args().dataloader_inter_document_masking or is_first_or_last_pipeline_stage(
        vp_stage
    )
    return mpu.get_tensor_model_parallel_rank() == 0 and reads_batch


class FixedSamples(torch.utils.data.Dataset):
    """A validation set in which every evaluation draws the same samples.

    Args:
        dataset: one epoch of the validation set.
        per_evaluation: samples per evaluation.
        num_samples: samples of all evaluations.
    Raises:
        ValueError: the set has no sample.
    """

    index_split = Split.valid  # selects the batch size of the data loader

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
        # A set with fewer samples than an evaluation draws is repeated.
        return self._dataset[index % self._per_evaluation % len(self._dataset)]


def provide_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Megatron's train_valid_test_datasets_provider.

    Args:
        num_samples: numbers of samples of the training, validation and test set.
        vp_stage: virtual pipeline stage.
    Returns:
        Training, validation and test set. With --multiple-validation-sets a list of validation
        sets, each of `num_samples[1]` samples, or of one epoch with --full-validation.
    Raises:
        ValueError: --eval-iters is not 0, and there is no validation set.
    """
    args = get_args()
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    if args.sft:
        dataset_class = ChatDataset
    is_built = partial(_builds_datasets, vp_stage)
    fixed_samples = args.multiple_validation_sets and not args.full_validation
    wanted = list(num_samples)
    if fixed_samples:
        wanted[Split.valid.value] = None  # one epoch of each set
    config = dataset_config(args)
    skip_unused_splits(config, num_samples)
    builder = BlendedMegatronDatasetBuilder(dataset_class, wanted, is_built, config)
    train, valid, test = builder.build()
    if valid is None and args.eval_iters and is_built():
        raise ValueError(
            f"There is no validation set, and --eval-iters is {args.eval_iters}. Give "
            "--eval-iters 0, or hold documents out (gptoss tokenize --validation-share, or "
            "--split)."
        )
    if fixed_samples:
        valid = [
            dataset and FixedSamples(dataset, _samples_per_evaluation(args), num_samples[1])
            for dataset in (valid if isinstance(valid, list) else [valid])
        ]
    return train, valid, test


def skip_unused_splits(config: GPTDatasetConfig, num_samples: list[int | None]) -> None:
    """Do not build a split from which no sample is drawn; it may have no documents.

    Args:
        config: its `split_matrix` is changed in place.
        num_samples: samples of the training, validation and test set; None: one epoch.
    """
    if config.split_matrix is not None:
        config.split_matrix = [
            None if wanted == 0 else part for wanted, part in zip(num_samples, config.split_matrix)
        ]


def _samples_per_evaluation(args: Namespace) -> int:
    return args.eval_iters * args.eval_global_batch_size


# Megatron then calls this function on every rank, and the builder calls _builds_datasets.
provide_datasets.is_distributed = True
