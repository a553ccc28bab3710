"""Train DeepLabV3+ on a timm backbone: the paper's transfer to segmentation.

    accelerate launch train/segment.py --config train/recipes/segment_camvid.yaml --dataset DIR
    accelerate launch --mixed_precision bf16 train/segment.py --run RUN --resume

Run folder, resume, time limit, precision and processes are as for distill.py. Options: `--help`.
"""

from __future__ import annotations

from launch import launch
from segmenter import SegmentationRecipe, Segmenter


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    launch(Segmenter, SegmentationRecipe, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    cli()
