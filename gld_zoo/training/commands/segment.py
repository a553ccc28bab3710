"""Train DeepLabV3+ on a timm backbone: the paper's transfer to segmentation.

    gld-zoo segment --config segment_camvid --dataset DIR
    ACCELERATE_MIXED_PRECISION=bf16 gld-zoo segment --run RUN --resume

Run folder, resume, time limit, precision and processes are `gld-zoo distill`'s. Options: `--help`.
"""

from __future__ import annotations

from gld_zoo.training.engine.launch import launch
from gld_zoo.training.tasks.segmenter import SegmentationRecipe, Segmenter


def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    launch(Segmenter, SegmentationRecipe, __doc__.splitlines()[0], arguments, prog)
