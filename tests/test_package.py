"""What importing the package does, and does not; and that the benchmarks find what they import."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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
        "for name in ('accelerate', 'datasets', 'jsonargparse', 'matplotlib'):\n"
        "    assert name not in new, name\n"
        "print(seconds)\n"
    )
    assert float(output) < 0.3  # 0.01 s measured


@pytest.mark.parametrize("name", sorted(path.stem for path in CHECKOUT.glob("benchmarks/*.py")))
def test_every_benchmark_finds_what_it_measures(name, monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    importlib.import_module(name)


def test_package_never_imports_the_trainer():
    forbidden = {path.stem for path in (CHECKOUT / "train").glob("*.py")}
    forbidden |= {"accelerate", "datasets", "jsonargparse", "matplotlib", "torchmetrics", "train"}
    for path in (CHECKOUT / "gld_zoo").glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        assert not imported & forbidden, path


def test_documented_modules_are_there_after_the_import():
    run("import gld_zoo; gld_zoo.hub.save_pretrained, gld_zoo.detection.DenseSSD")
