"""Train SSD300 on a timm backbone: the paper's transfer to detection.

    accelerate launch train/detect.py --config train/recipes/detect_coco128.yaml --dataset DIR
    accelerate launch --mixed_precision bf16 train/detect.py --run RUN --resume

Run folder, resume, time limit, precision and processes are as for distill.py. Options: `--help`.
"""

from __future__ import annotations

from detector import DetectionRecipe, Detector
from launch import launch


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    launch(Detector, DetectionRecipe, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    cli()
