"""Files of options: YAML in UTF-8, those of earlier versions too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "recipe"  # how jsonargparse reads YAML here


def load_yaml(text: str) -> Any:
    """Read YAML; a recipe of an earlier version becomes one of this.

    Before there were schedules, `lr_power` chose one: null the drops, a number the poly schedule.
    """
    value = get_loader("yaml")(text)
    if isinstance(value, dict) and "lr_power" in value and "schedule" not in value:
        value["schedule"] = "steps" if value["lr_power"] is None else "poly"
        if value["lr_power"] is None:
            del value["lr_power"]
    return value


set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError,))


def check_text(path: Path) -> None:
    """Refuse a recipe that is no text in UTF-8.

    Raises:
        ValueError: If it is not, or cannot be read.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return  # a pipe, which could not be read again
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"the recipe {path} is not in UTF-8 (line {line}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(
            f"cannot read the recipe {path}: {error.strerror}; name a YAML file that can be read"
        ) from error
