"""From a command line to a recipe and the folder that it runs in."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentParser

from gld_zoo import recipes
from gld_zoo.training.config.options import Options
from gld_zoo.training.config.recipe_files import MODE, check_text

Kind = TypeVar("Kind", bound=Options)
# all options would be fifty lines above each mistake
USAGE = "%(prog)s [--config RECIPE] [--OPTION VALUE ...]"


@dataclass(frozen=True)
class Command(Generic[Kind]):
    """A recipe and where it runs."""

    recipe: Kind
    run: Path
    resume: bool


def parse_command(
    kind: type[Kind], description: str, argv: list[str], prog: str | None = None
) -> Command[Kind]:
    """Read `--config RECIPE`, then `--field value` over it; a mistake ends the program.

    Args:
        kind: Of the recipe.
        description: For `--help`.
        argv: The command line.
        prog: What `--help` calls the program; None takes its file's name.
    """
    parser = ArgumentParser(
        prog=prog, usage=USAGE, description=description, parser_mode=MODE, allow_abbrev=False
    )
    add_config(parser)
    parser.add_argument(
        "--run", type=str | None, help="run folder; null makes runs/<recipe>-<seed>"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run folder's newest checkpoint, if any; its recipe need not be given",
    )
    kind.add_to(parser)
    values = parser.parse_args(configs_first(_with_saved_recipe(argv), prog)).as_dict()
    configs, run, resume = values.pop("config") or [], values.pop("run"), values.pop("resume")
    recipe = _made(kind, values, parser)
    return Command(recipe, Path(run or default_run(recipe, configs)), resume)


def parse_recipe(
    kind: type[Kind], description: str, argv: list[str], prog: str | None = None
) -> Kind:
    """Read a recipe as `parse_command` does, for a command that makes no run."""
    parser = ArgumentParser(
        prog=prog, usage=USAGE, description=description, parser_mode=MODE, allow_abbrev=False
    )
    add_config(parser)
    kind.add_to(parser)
    values = parser.parse_args(configs_first(argv)).as_dict()
    del values["config"]
    return _made(kind, values, parser)


def _made(kind: type[Kind], values: dict[str, Any], parser: ArgumentParser) -> Kind:
    try:
        return kind(**values)
    except ValueError as error:
        parser.error(str(error))


def add_config(parser: ArgumentParser) -> None:
    """Give a parser the option that names a recipe; `configs_first` makes paths of names."""
    parser.add_argument(
        "--config",
        action="config",
        help="recipe: the name of one of the package's, or a YAML file of options; those given "
        "here override it",
    )


def configs_first(argv: list[str], prog: str | None = None) -> list[str]:
    """Return the arguments with each `--config` before what overrides it, as the path of a file.

    A recipe that cannot be found, is no text or another command's ends the program with one line
    that names it.

    Args:
        argv: The command line.
        prog: The command, as `gld-zoo distill`; None takes any recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", default=[])
    given, others = parser.parse_known_args(argv)
    if None in given.config:  # which the parser of all options tells
        return argv
    try:
        paths = [_recipe_path(name, prog) for name in given.config]
    except ValueError as error:
        sys.exit(f"error: {error}")
    return [*(part for path in paths for part in ("--config", path)), *others]


def _recipe_path(name: str, prog: str | None) -> str:
    if ":" in name and not os.path.lexists(name):
        return name  # options themselves, which jsonargparse takes in a file's place
    path, command = recipes.find(name), recipes.command_of(name)
    if name in recipes.names() and prog and not prog.endswith(command):
        raise ValueError(f"{name} is a recipe of gld-zoo {command}")
    check_text(Path(path))
    return path


def _with_saved_recipe(argv: list[str]) -> list[str]:
    """Return the arguments, for a run that goes on without a recipe with its folder's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--run", nargs="?")
    parser.add_argument("--resume", action="store_true")
    given, others = parser.parse_known_args(argv)
    if "--config" in argv or given.config or not (given.resume and given.run):
        return argv
    saved = Path(given.run) / "recipe.yaml"
    if os.path.isfile(saved):  # which is false where a name is too long, and pathlib's raises
        return ["--config", str(saved), *argv]
    if not others:
        sys.exit(
            f"error: {given.run} holds no run to resume (there is no {saved}); name another, "
            "or begin one by its options"
        )
    return argv


def default_run(recipe: Options, configs: list[Any]) -> str:
    """Name a run after its recipe's file, that file's folder for a saved recipe, or its model."""
    name = Path(str(configs[-1])).stem if configs else recipe.subject
    if configs and name == "recipe":
        name = Path(str(configs[-1])).resolve().parent.name
    name = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return f"runs/{name}-{recipe.seed}"
