"""Linear transfer: the accuracy of a linear classifier on a frozen model's features.

    gld-zoo probe --config linear_stl10 --model gld_wrn16_1
    gld-zoo probe --model runs/mine-0 --dataset DIR --json out.json

The pooled features of every image, prepared as the model's cfg says, and of its mirror image for
training, are computed once, in float32. On them multinomial logistic regression is fitted to its
optimum by L-BFGS, so that no schedule has a say. The L2 penalty is the best of seven on a tenth of
the training images, held out class by class; then all of them are used, and the test split is read
once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from gld_zoo.output import end, printing
from gld_zoo.training.common.devices import measuring_device
from gld_zoo.training.common.disk import write_json
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.config.command_line import add_config, configs_first
from gld_zoo.training.config.dataset_options import add_measuring_options, add_source_options
from gld_zoo.training.config.recipe_files import MODE
from gld_zoo.training.data.sources import open_source
from gld_zoo.training.measure.probe import linear_probe
from gld_zoo.training.measure.tables import table


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(
        prog=prog, description=__doc__.splitlines()[0], parser_mode=MODE, allow_abbrev=False
    )
    add_config(parser)
    name = "timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder"
    parser.add_argument("--model", type=str, required=True, help=name)
    add_source_options(parser)
    add_measuring_options(parser)
    parser.add_argument("--mirror", type=bool, default=True, help="train on mirror images too")
    parser.add_argument("--seed", type=int, default=0, help="of the images held out")
    options = parser.parse_args(configs_first(arguments, prog))
    try:
        result = linear_probe(
            options.model,
            open_source(options),
            image_size=options.image_size,
            mirror=options.mirror,
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            device=measuring_device(),
        )
        print(table(result))
        if options.json:
            write_json(Path(options.json), result)
    except TrainingError as error:
        sys.exit(f"error: {error}")
