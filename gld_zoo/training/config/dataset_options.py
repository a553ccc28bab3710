"""The options by which a command is told a dataset, and how to measure on it."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt


def add_source_options(
    parser: ArgumentParser,
    *,
    positional: bool = False,
    required: bool = True,
    test_fraction: float | Literal["auto"] = 0.0,
) -> None:
    """Give a parser the options that name a dataset, its splits and columns.

    Args:
        parser: To add to.
        positional: Whether the dataset is given without the name of an option.
        required: Whether it must be given; otherwise that of a run folder can be taken.
        test_fraction: Its default.
    """
    if positional:
        parser.add_argument("dataset", type=str, help="hub id or folder")
    elif required:
        parser.add_argument("--dataset", type=str, required=True, help="hub id or folder")
    else:
        parser.add_argument(
            "--dataset", type=str | None, help="hub id or folder; null: the run's own"
        )
    parser.add_argument("--dataset_config", type=str | None, help="name of one of its configs")
    parser.add_argument("--dataset_revision", type=str | None, help="branch, tag or commit")
    parser.add_argument("--train_split", type=str, default="train", help="split of training images")
    parser.add_argument("--test_split", type=str | None, help="null: 'test', else 'validation'")
    parser.add_argument(
        "--test_fraction",
        type=float | Literal["auto"],
        default=test_fraction,
        help="of train, as it was set for a run; auto: a fifth where there is no test split",
    )
    parser.add_argument(
        "--image_column", type=str | None, help="null: the only one of images, or the usual name"
    )
    parser.add_argument(
        "--label_column", type=str | None, help="null: the only one of classes, or the usual name"
    )


def add_measuring_options(parser: ArgumentParser) -> None:
    """Give a parser the options of how models are shown images, and where the result goes."""
    parser.add_argument(
        "--image_size", type=PositiveInt | None, help="pixels a side; null: the model's own"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=250, help="images a forward pass")
    parser.add_argument(
        "--workers",
        type=NonNegativeInt,
        default=0,
        help="processes that read images; 0: none, and in memory where they fit",
    )
    parser.add_argument("--json", type=str | None, help="file to write the result to")
