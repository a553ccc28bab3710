"""Draw what a detector or a segmenter finds in images.

    gld-zoo draw runs/mine-0/last photo.jpg photos/ --out drawn
    gld-zoo draw runs/mine-0 'photos/*.png' --out drawn --threshold 0.5

Boxes carry their class and confidence; masks are coloured by class, their names beside the image.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torchvision.models.detection.ssd import SSD
from torchvision.transforms import v2

from gld_zoo.downstream.saving import load_downstream
from gld_zoo.images import find_images, read_images
from gld_zoo.output import end, printing
from gld_zoo.training.common.disk import writing
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.measure.drawing import draw_boxes, draw_mask


def build_parser(prog: str | None) -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("model", type=str, help="run folder, or a folder such as its last/")
    parser.add_argument("images", type=str, nargs="+", help="file, folder or pattern")
    parser.add_argument("--out", type=str, required=True, help="folder for the drawings")
    parser.add_argument(
        "--threshold", type=ClosedUnitInterval, default=0.4, help="least confidence of a box"
    )
    parser.add_argument(
        "--image_size",
        type=PositiveInt | None,
        help="longer side in pixels that a segmenter sees; null: as it was measured",
    )
    return parser


def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    with printing(failed=end):  # the help
        options = build_parser(prog).parse_args(arguments)
    failed: list[Path] = []
    with printing(failed=go_on):
        try:
            for line in draw(options, failed):
                print(line)
        except (TrainingError, ValueError) as error:
            sys.exit(f"error: {error}")
    sys.exit(int(bool(failed)))


def go_on(error: OSError) -> None:
    """Tell that images are drawn although nobody reads of it."""
    print(
        f"standard output takes no more ({error.strerror}); the drawings go on without messages",
        file=sys.stderr,
    )


def draw(options: Any, failed: list[Path]) -> Iterator[str]:
    """Write a drawing of each image and yield a line that lists what was found.

    Args:
        options: The command line's.
        failed: Takes the images that cannot be read.

    Raises:
        DiskError: If a drawing cannot be written.
        ValueError: If the folder holds no model, or drawings would go where the images are.
    """
    given = Path(options.model)
    last = given / "last"
    model = load_downstream(last if os.path.isdir(last) else given)
    size = options.image_size or model.config["image_size"]
    if size is None and not isinstance(model, SSD):
        raise ValueError(
            f"{options.model} does not say how large its images were; set --image_size"
        )
    out, used = Path(options.out), set()
    paths = list(find_images(options.images))
    if not paths:
        raise ValueError(f"no image in {' '.join(options.images)}")
    for path in paths:
        if path.resolve().parent == out.resolve():
            raise ValueError(
                f"--out {out} holds {path.name}, an image to draw; name another folder"
            )
    for path, image in read_images([str(path) for path in paths], failed):
        pixels = v2.functional.pil_to_tensor(image)
        if isinstance(model, SSD):
            drawn, found = draw_boxes(model, pixels, options.threshold)
        else:
            drawn, found = draw_mask(model, pixels, size)
        # photos of one name in two folders are two drawings
        names = itertools.chain([path.stem], (f"{path.stem}-{i}" for i in itertools.count(1)))
        name = next(name for name in names if name not in used)
        used.add(name)
        target = out / f"{name}.png"
        with writing(target):
            out.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image(drawn).save(target)
        yield f"{path}: {found}"
