r"""Record finished runs in results.json; with --ship, take the first one's weights in too.

    python train/release.py runs/X runs/X-seed1 --name gld_wrn16_1.wrn16_2_cifar100 --ship \
        --recipe cifar100_wrn16_2_wrn16_1 --setup b --role gld --test_set uoft-cs/cifar100

Several runs are the seeds of one row. A teacher of this zoo is recorded first. Without --setup and
--role the table of setups stays as it is. Then register a shipped tag in the model's file and run
`python train/card.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save
from timm.data import resolve_model_data_config

from gld_zoo import recipes, results
from gld_zoo.hub import save_pretrained
from gld_zoo.results import METHODS, ROLES, Results, Row
from gld_zoo.training.build.create import create_frozen, resolve_data_config
from gld_zoo.training.common.disk import sha256
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Normalize, Transforms
from gld_zoo.training.data.memory import decode
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.evaluation import evaluate
from gld_zoo.training.runs.finished_run import FinishedRun

PACKAGE = results.PATH.parent
LARGEST = 25_000_000  # bytes of a file that travels with the package
PLACES = (*ROLES, *(f"method_{name}" for name in METHODS))  # of a row in a setup
NOT_COMPARED = {"dataset", "teacher", "seed", "compile"}  # told elsewhere, or no change of result


def release(
    runs: list[Path],
    name: str,
    recipe_name: str,
    test_set: str,
    *,
    ship: bool = True,
    float16: bool = False,
) -> Row:
    """Copy finished runs' log, and weights to ship, into the package; return their row.

    Nothing in the package is touched before all of it has been checked.

    Args:
        runs: Finished run folders that differ in their seed; the first one's file is taken.
        name: Architecture and tag of the weights.
        recipe_name: Of the recipe that the runs follow.
        test_set: Dataset on whose test split the file is measured, in float32.
        ship: Take the weights into the package; otherwise only their log and hash.
        float16: Ship tensors of two or more dimensions in float16.

    Raises:
        RunError: If a run is not finished.
        ValueError: If its student is not the named architecture, runs differ in more than their
            seed, the teacher's weights are not on record, or the file does not score what the run's
            log says or is too large.
    """
    finished = [FinishedRun.load(run) for run in runs]
    first = finished[0]
    check_architecture(finished, name)
    check_seeds(finished)
    published = Recipe.load(recipes.path_of(recipe_name))
    teacher = teacher_on_record(first.summary["teacher"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = repack(first, Path(temporary), float16=float16 and ship)
        measured = measure_file(folder, name, first, test_set, tolerance=0.05 if float16 else 0.01)
        digest = sha256(folder / "model.safetensors")
        copy_files(folder, first, name, ship=ship)
    return Row.from_dict(
        dict(
            first.description(),
            teacher=teacher,
            recipe=recipe_name,
            changes=changes(first.portable(), published, teacher),
            file=f"{name}.safetensors" if ship else None,
            sha256=digest,
            license="apache-2.0",
            **scores_of(finished, measured),
        )
    )


def scores_of(runs: list[FinishedRun], measured: dict[str, Any]) -> dict[str, Any]:
    """Return what a row tells of scores: the first run's as measured of its file."""
    scores = {key: round(measured[key], 2) for key in ("top1", "top5")}
    first, *others = (run.scores() for run in runs)
    return dict(
        test_images=measured["images"],
        parameters=measured["parameters"],
        runs=[dict(first, **scores), *others],
    )


def check_architecture(runs: list[FinishedRun], name: str) -> None:
    """Refuse a name without a tag, and runs of another architecture.

    Raises:
        ValueError: If there is one.
    """
    architecture, _, tag = name.partition(".")
    if not tag:
        raise ValueError(f"--name {name} has no tag; name the weights ARCHITECTURE.TAG")
    for run in runs:
        config = json.loads((run.path / "last" / "config.json").read_text(encoding="utf-8"))
        if config["architecture"] != architecture:
            raise ValueError(f"{run.path} trained {config['architecture']}, not {name}")


def measure_file(
    folder: Path, name: str, run: FinishedRun, test_set: str, *, tolerance: float
) -> dict[str, Any]:
    """Return what the very file scores.

    Raises:
        ValueError: If that is not, to a tolerance in %, what its run's log says.
    """
    cpu = torch.device("cpu")
    measured = evaluate(f"local-dir:{folder}", ImageSource(test_set), grid=0, device=cpu)
    if abs(round(measured["top1"], 2) - run.summary["top1"]) > tolerance:
        raise ValueError(
            f"{name} scores {measured['top1']:.2f} %, its log says {run.summary['top1']:.2f}"
        )
    return measured


def copy_files(folder: Path, run: FinishedRun, name: str, *, ship: bool) -> None:
    """Copy a run's log into the package, and what was repacked of it if it ships.

    Raises:
        ValueError: If the file of weights is too large; nothing is copied.
    """
    file, log = folder / "model.safetensors", PACKAGE / "weights" / f"{name}.metrics.jsonl"
    size = file.stat().st_size
    if ship and size > LARGEST:
        raise ValueError(f"{name} has {size:,} bytes, more than {LARGEST:,}; try --float16")
    shutil.copyfile(run.path / "metrics.jsonl", log)
    if ship:
        shutil.copyfile(file, log.with_name(f"{name}.safetensors"))
        logits = json.dumps(stored_logits(f"local-dir:{folder}")) + "\n"
        log.with_name(f"{name}.logits.json").write_text(logits, encoding="utf-8")


def check_seeds(runs: list[FinishedRun]) -> None:
    """Refuse runs that are not the seeds of one row.

    Raises:
        ValueError: If two have the same seed, or they or a run's own launches differ in recipe,
            teacher, precision or processes.
    """
    first = runs[0]
    for number, other in enumerate(runs):
        different = dataclasses.replace(other.recipe, seed=first.recipe.seed)
        if differences := different.differences(first.recipe):
            raise ValueError(f"{other.path} is a run of another recipe: {'; '.join(differences)}")
        if other.recipe.seed in [run.recipe.seed for run in runs[:number]]:
            raise ValueError(f"{other.path} is a second run of seed {other.recipe.seed}")
        theirs, ours = ((run.summary["teacher"] or {}).get("sha256") for run in (other, first))
        if theirs != ours:
            raise ValueError(f"{other.path} had a teacher of other weights than {first.path}")
        for launch in other.launches:
            for name in ("mixed_precision", "processes"):
                if launch[name] != first.environment[name]:
                    raise ValueError(
                        f"{other.path} was trained, at least in part, with {name} {launch[name]}, "
                        f"{first.path} with {first.environment[name]}; a row tells of one"
                    )


def teacher_on_record(teacher: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the teacher that a run was distilled from, by the name its weights have in the zoo.

    Raises:
        ValueError: If it is a local model whose weights are not on record.
    """
    if teacher is None:
        return None
    for name, row in Results.load().rows.items():
        if teacher["sha256"] in _hashes(row):
            return dict(teacher, name=name)
    if teacher["name"].startswith(("local-dir:", "gld_")):
        digits = teacher["sha256"][:12]
        raise ValueError(
            f"teacher {teacher['name']} has weights of sha256 {digits}..., which results.json does "
            "not hold; release the teacher first"
        )
    return teacher


def _hashes(row: Row) -> set[str | None]:
    """Return the hashes of a row's weights: of the file, as trained, and as loaded."""
    hashes = {row.sha256, *(run.sha256 for run in row.runs)}
    if row.file:  # perhaps in float16, which timm loads into float32
        tensors = load_file(PACKAGE / "weights" / row.file)
        widened = {
            name: value.float() if value.dtype == torch.float16 else value
            for name, value in tensors.items()
        }
        hashes.add(hashlib.sha256(save(widened, metadata={"format": "pt"})).hexdigest())
    return hashes


def record(found: Results, name: str, row: Row, place: tuple[str, str] | None) -> None:
    """Put a row where it belongs: a name is either a weight that ships or a run that does not.

    Args:
        found: What is on record, which changes.
        name: Architecture and tag.
        row: What `release` returned.
        place: Row and column of the table of setups; None leaves that table as it is.
    """
    into, other = (found.weights, found.runs) if row.file else (found.runs, found.weights)
    other.pop(name, None)
    into[name] = row
    if place is None:
        return
    setup, role = place
    roles = found.setups[setup]
    roles.setdefault(role, dict(model=name.split(".")[0], paper_top1=None))
    roles[role]["weights"] = name


def repack(run: FinishedRun, folder: Path, *, float16: bool) -> Path:
    """Write a run's weights anew, in float16 if asked; return the folder, as timm loads it."""
    model = timm.create_model(f"local-dir:{run.path / 'last'}", pretrained=True)
    config = resolve_data_config(model, run.recipe.image_size, run.recipe.crop_pct)
    names = model.pretrained_cfg["label_names"]
    return save_pretrained(model, folder, label_names=names, data_config=config, float16=float16)


@torch.no_grad()
def stored_logits(name: str) -> dict[str, Any]:
    """Return two bundled images uint8 `[2, H, W, 3]` and the logits `[2, K]` they must give."""
    model: Any = create_frozen(name, torch.device("cpu"))
    config = resolve_model_data_config(model)
    rows = ImageSource(str(PACKAGE / "data" / "cifar100_mini")).test
    size = config["input_size"][-1]
    pixels = decode(rows, Transforms(size).fit(), size).images[:2]
    logits = model(Normalize(config["mean"], config["std"], pixels.device)(pixels))
    rounded = [[round(value, 5) for value in row] for row in logits.tolist()]
    return dict(images=pixels.tolist(), logits=rounded)


def changes(
    used: Recipe, published: Recipe, teacher: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the options that decide a result and that a run changed from the recipe it names.

    Args:
        used: The run's options.
        published: The recipe's.
        teacher: The one on record, which is what counts where the options give a local folder.
    """
    different = {
        name: getattr(used, name)
        for name in used.deciding()
        if name not in NOT_COMPARED and getattr(used, name) != getattr(published, name)
    }
    if used.beta == used.scaled_beta and published.beta == published.scaled_beta:
        different.pop("beta", None)  # which follows from the batch and the grid
    actual, wanted = teacher and teacher["name"], published.teacher
    if actual != wanted and not (actual and wanted and wanted.startswith("local-dir:")):
        different["teacher"] = actual
    return different


def main() -> None:
    """Run the command line: record a row's runs, and ship the first one's weights if asked."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders, one a seed")
    parser.add_argument("--name", type=str, required=True, help="architecture.tag of the weights")
    parser.add_argument("--recipe", type=str, required=True, help="name of the recipe they follow")
    parser.add_argument(
        "--test_set", type=str, required=True, help="dataset to measure the file on"
    )
    parser.add_argument("--setup", type=str | None, help="row of the table of setups; null: none")
    parser.add_argument("--role", type=Literal[PLACES] | None, help="column of that row")
    parser.add_argument("--ship", action="store_true", help="take the weights into the package")
    parser.add_argument(
        "--float16", action="store_true", help="ship tensors of two or more dimensions in float16"
    )
    options = parser.parse_args()
    setups = list(Results.load().setups)
    if (options.setup is None) != (options.role is None):
        parser.error("--setup and --role are given together, or neither")
    if options.setup and options.setup not in setups:
        parser.error(f"--setup {options.setup} is not in results.json; it has {', '.join(setups)}")
    row = release(
        options.runs,
        options.name,
        options.recipe,
        options.test_set,
        ship=options.ship,
        float16=options.float16,
    )
    found = Results.load()
    place = (options.setup, options.role) if options.setup else None
    record(found, options.name, row, place)
    found.save()
    scores = ", ".join(f"{run.top1:.2f}" for run in row.runs)
    print(f"{options.name}: top-1 {scores} %, {row.file or 'not shipped'}")


if __name__ == "__main__":
    main()
