"""What tests share: a small dataset, a small run, and a trainer in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PictureFile

import gld_zoo
from gld_zoo.results import Row

CHECKOUT = Path(__file__).parent.parent
BUNDLED = Path(gld_zoo.__file__).parent / "data" / "cifar100_mini"
FEATURES = Features(
    img=Image(), fine_label=ClassLabel(names=["apple", "aquarium_fish", "baby", "bear"])
)
SMALL_RUN = ["--student", "gld_wrn16_1", "--epochs", 2, "--batch_size", 16, "--lr", 0.05]
SMALL_RUN += ["--threads", 1]  # the same bits in every process
# torchrun's: on a free port, as another test may hold the default one, and by no name to look up
STANDALONE = ("--standalone", "--local_addr", "127.0.0.1")


def write_dataset(folder, splits, features=FEATURES):
    """Write `{split: columns}` in hub layout."""
    for name, columns in splits.items():
        path = folder / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return folder


def launch(*options, processes=1, precision="no", module="gld_zoo.training.distill"):
    """Run a trainer as a user does, in processes of its own; return what it printed."""
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--mixed_precision", precision, "-m", module]
    if processes > 1:  # accelerate starts one process on a CPU whatever it is told
        command = ["torch.distributed.run", *STANDALONE, "--nproc_per_node", str(processes)]
        command += ["-m", "--", module]
    environment = dict(os.environ)
    if not torch.accelerator.is_available():
        del environment["ACCELERATE_USE_CPU"]  # which a user need not know
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            *command,
            *map(str, options),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(environment, PYTHONPATH=os.pathsep.join(map(str, (CHECKOUT, CHECKOUT / "tests")))),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def read_lines(path):
    """Parse a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def row(**values):
    """Return a row of results of one run, with what else is given."""
    run = dict(seed=0, top1=70.0, top5=90.0, best_epoch=1, best_epoch_top1=70.0, commit="x")
    usual = dict(dataset="x", teacher=None, recipe="x", changes={}, precision="float32", sha256="x")
    return Row.from_dict(dict(usual, hardware="cpu", parameters=1, runs=[run]) | values)


def assert_picture(path):
    """Assert that a file is a PNG with something on it; return its width and height."""
    with PictureFile.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
        return picture.size
