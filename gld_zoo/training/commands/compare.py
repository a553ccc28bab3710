"""Compare models on a dataset: accuracy, size, speed, and how often they agree.

    gld-zoo compare runs/photos-0 runs/alone-0
    gld-zoo compare gld_wrn16_1.ce_cifar100 gld_wrn16_1.wrn16_2_cifar100 --dataset uoft-cs/cifar100

The first is what the others are compared with. In float32, each with the preprocessing of its own
cfg; images/s is the forward pass alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from gld_zoo.output import end, printing
from gld_zoo.training.common.devices import measuring_device
from gld_zoo.training.common.disk import write_json
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.config.dataset_options import add_measuring_options, add_source_options
from gld_zoo.training.measure.comparison import compare, comparison_table, draw_comparison
from gld_zoo.training.measure.inputs import open_test_source


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    name = "timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=name)
    add_source_options(parser, required=False)
    add_measuring_options(parser)
    parser.add_argument("--picture", type=Path | None, help="PNG to draw")
    options = parser.parse_args(arguments)
    try:
        result = compare(
            options.models,
            open_test_source(options, options.models),
            image_size=options.image_size,
            batch_size=options.batch_size,
            workers=options.workers,
            device=measuring_device(),
        )
        print(comparison_table(result))
        if options.picture:
            draw_comparison(result, options.picture)
        if options.json:
            write_json(Path(options.json), result)
    except (TrainingError, ValueError) as error:
        sys.exit(f"error: {error}")
