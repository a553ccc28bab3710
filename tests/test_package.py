"""What importing the package does, and does not; its rooms; and that the benchmarks run."""

import ast
import json
import pkgutil
import runpy
import subprocess
import sys

import pytest
import torch
from datasets import Image, load_dataset
from importlinter.cli import lint_imports

import gld_zoo
from helpers import BUNDLED, CHECKOUT, write_dataset


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_import_is_cheap_quiet_and_offline():
    output = run(
        "import logging, random, socket, sys, time\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import timm, torch\n"
        "state, handlers = torch.get_rng_state(), list(logging.root.handlers)\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import gld_zoo\n"
        "seconds = time.perf_counter() - start\n"
        "new = set(sys.modules) - before\n"
        "assert torch.equal(state, torch.get_rng_state()) and handlers == logging.root.handlers\n"
        "extras = {'accelerate', 'datasets', 'gradio', 'jsonargparse', 'matplotlib'}\n"
        "extras |= {'gld_zoo.demo', 'gld_zoo.training'}\n"
        "assert not extras & new, extras & new\n"
        "print(seconds)\n"
    )
    assert float(output) < 0.3  # 0.01 s measured


def test_rooms_import_only_those_below_them():
    """Layers of the package and of its trainer, and a zoo that knows nothing of the trainer."""
    config = str(CHECKOUT / "pyproject.toml")
    assert lint_imports(config_filename=config, cache_dir=None, no_logo=True) == 0


def test_every_module_of_the_zoo_is_kept_from_the_trainers_packages():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (forbidden,) = (each for each in contracts["contracts"] if each["type"] == "forbidden")
    modules = {f"gld_zoo.{module.name}" for module in pkgutil.iter_modules(gld_zoo.__path__)}
    assert set(forbidden["source_modules"]) == modules - {"gld_zoo.training"}


def test_functions_are_short():
    lengths = {}
    for folder in ("gld_zoo", "train", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    lengths[f"{path.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert len(lengths) > 500
    assert {name: lines for name, lines in lengths.items() if lines > 50} == {}


@pytest.mark.slow
def test_documented_modules_are_there_after_the_import():
    run(
        "import gld_zoo; gld_zoo.hub.save_pretrained, gld_zoo.downstream.load_downstream\n"
        "gld_zoo.recipes.names(), gld_zoo.results.Results"
    )


@pytest.mark.slow
def test_nothing_is_registered_by_importing_the_trainer():
    """Neither handlers of signals, nor what runs at exit beside the libraries' own."""
    run(
        "import atexit, signal\n"
        "import accelerate, datasets, matplotlib.pyplot, torch.utils.data, gld_zoo\n"
        "from gld_zoo.training.common import signals\n"
        "kept = {number: signal.getsignal(number) for number in signals.SIGNALS}\n"
        "registered = []\n"
        "atexit.register = lambda function, *_: registered.append(function)\n"
        "import gld_zoo.training.commands.distill\n"
        "assert kept == {number: signal.getsignal(number) for number in signals.SIGNALS}\n"
        "ours = [each for each in registered if each.__module__.startswith('gld_zoo')]\n"
        "assert not ours, ours\n"
    )


@pytest.fixture
def hundred_classes(tmp_path):
    """One of the bundled images of each class that the zoo's teachers know."""
    splits = load_dataset(str(BUNDLED))
    features, columns = splits["train"].features, {}
    for name, split in splits.items():
        first = {label: row for row, label in enumerate(split["fine_label"])}
        columns[name] = split.cast_column("img", Image(decode=False))[list(first.values())]
    return write_dataset(tmp_path / "data", columns, features)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("data", "--seconds 0.05 --workers 0 --dataset DATASET", "batch"),
        ("relation", "--batches 4 --cells 4 --classes 10 --seconds 0.01 --no_memory", "rows"),
        ("run_costs", "--threads 1 --dataset DATASET", "epochs: train"),
        (
            "store",
            "--student gld_wrn16_1 --rounds 1 --threads 1 --dataset DATASET",
            "store / alone",
        ),
        ("methods", "--rounds 1 --threads 1", "times of alone"),
        ("step", "--setup b --batch 4 --rounds 1 --no_memory --threads 1", "ours"),
    ],
)
def test_every_benchmark_measures(name, options, key, hundred_classes, tmp_path, monkeypatch):
    out, folder = tmp_path / "out.json", CHECKOUT / "benchmarks"
    words = [str(hundred_classes) if word == "DATASET" else word for word in options.split()]
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", [name, *words, "--out", str(out)])
    threads = torch.get_num_threads()
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert key in out.read_text()
    assert json.loads(out.read_text())
