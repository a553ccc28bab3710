"""Run timm's own model tests, from the installed timm's source, on every `gld_*` model.

    python tests/timm_suite.py [pytest options]

Downloads the source distribution with pip, so it needs a package index;
`tests/models/test_models.py` mirrors the contract offline. With `--sdist FILE` it takes one already
downloaded.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm

import gld_zoo  # noqa: F401  registers the models

_list_models = timm.list_models


def list_gld_models(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    exclude_filters: str | Sequence[str] = "",
    include_tags: bool | None = None,
    **kwargs: bool,
) -> list[str]:
    """Stand in for `timm.list_models` in timm's tests: `gld_*` only, whatever the module."""
    names = _list_models(
        "gld_*", exclude_filters=exclude_filters, include_tags=include_tags, **kwargs
    )
    patterns = [filter] if isinstance(filter, str) else filter
    return [
        name for name in names if any(fnmatch.fnmatch(name, pattern or "*") for pattern in patterns)
    ]


def download(folder: Path) -> Path:
    """Fetch timm's source distribution without building it."""
    if importlib.util.find_spec("pip") is None:
        sys.exit("there is no pip in this environment; python -m ensurepip, or give --sdist FILE")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    build_tools = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(folder / "build"),
        "pdm-backend",
    ]
    subprocess.run(build_tools, check=True)
    subprocess.run(
        [*pip, "--no-build-isolation", "-d", str(folder), f"timm=={timm.__version__}"],
        check=True,
        env=dict(os.environ, PYTHONPATH=str(folder / "build")),
    )
    return next(folder.glob("timm-*.tar.gz"))


def main(arguments: list[str]) -> int:
    """Unpack the tests and run those that name a `gld_*` model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "--sdist" in arguments:
            at = arguments.index("--sdist")
            archive = Path(arguments[at + 1])
            del arguments[at : at + 2]
        else:
            archive = download(folder)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        tests = next(folder.glob("timm-*/tests"))
        timm.list_models = list_gld_models
        options = [
            "-k",
            "gld_",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tests),
            "-c",
            "/dev/null",
        ]
        return pytest.main([str(tests / "test_models.py"), *options, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
