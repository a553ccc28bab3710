"""Measure a model on a dataset: accuracy, local rows, calibration, agreement, size and speed.

    gld-zoo evaluate --model gld_wrn16_1 --dataset uoft-cs/cifar100
    gld-zoo evaluate --model runs/mine-0 --teacher gld_wrn16_2 --json out.json

In float32, with the preprocessing of the model's cfg; images/s is the forward pass alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from gld_zoo.output import end, printing
from gld_zoo.training.common.devices import measuring_device
from gld_zoo.training.common.disk import write_json
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.config.dataset_options import add_measuring_options, add_source_options
from gld_zoo.training.measure.evaluation import evaluate
from gld_zoo.training.measure.inputs import open_test_source, recipe_of
from gld_zoo.training.measure.tables import table


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    model = "timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder"
    parser.add_argument("--model", type=str, required=True, help=model)
    parser.add_argument("--teacher", type=str | None, help=f"compare with it: {model}")
    parser.add_argument(
        "--teacher_size",
        type=PositiveInt | Literal["own"] | None,
        help="side of the images it sees, or own; null: as the run's recipe has it",
    )
    add_source_options(parser, required=False)
    add_measuring_options(parser)
    parser.add_argument(
        "--grid", type=NonNegativeInt, default=2, help="cells a side; 0: no local rows"
    )
    parser.add_argument(
        "--mirror", type=bool, default=False, help="mean of the logits over an image and its mirror"
    )
    parser.add_argument("--picture", type=Path | None, help="PNG of which class is taken for which")
    options = parser.parse_args(arguments)
    if options.teacher_size and not options.teacher:
        sys.exit(
            f"error: teacher_size={options.teacher_size} is of a --teacher, which is not given"
        )
    try:
        run = recipe_of(options.model)
        result = evaluate(
            options.model,
            open_test_source(options, [options.model]),
            teacher=options.teacher,
            teacher_size=options.teacher_size or getattr(run, "teacher_size", None),
            grid=options.grid,
            image_size=options.image_size,
            batch_size=options.batch_size,
            workers=options.workers,
            mirror=options.mirror,
            picture=options.picture,
            device=measuring_device(),
        )
        print(table(result))
        if options.json:
            write_json(Path(options.json), result)
    except (TrainingError, ValueError) as error:
        sys.exit(f"error: {error}")
