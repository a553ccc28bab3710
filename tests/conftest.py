"""Offline, seeded, and with a small dataset of real images made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # `pytest -n` runs tests side by side

import contextlib
import io
import multiprocessing
import signal

import datasets
import pytest
import torch
from datasets import Image, load_dataset

from gld_zoo.training.commands.distill import cli
from helpers import BUNDLED, SMALL_RUN, write_dataset

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.2  # after each stream; 5 s by default


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def workers_end():
    """End the workers of a test's loaders: left to the garbage collector, each costs five seconds.

    They ignore SIGTERM, and torch would report them as killed.
    """
    yield
    left = multiprocessing.active_children()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)


@pytest.fixture(scope="session")
def rows():
    """Columns of the bundled images of four classes, still encoded: 80 and 40 rows."""
    splits = load_dataset(str(BUNDLED))
    columns = {}
    for name, split in splits.items():
        split = split.filter(lambda label: label < 4, input_columns="fine_label").cast_column(
            "img", Image(decode=False)
        )
        columns[name] = {"img": list(split["img"]), "fine_label": list(split["fine_label"])}
    return columns


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory, rows):
    """A folder in hub layout with 64 training and 33 test images of four classes."""
    folder = tmp_path_factory.mktemp("tiny")
    counts = dict(train=64, test=33)
    return write_dataset(
        folder,
        {
            name: {key: column[: counts[name]] for key, column in rows[name].items()}
            for name in counts
        },
    )


@contextlib.contextmanager
def one_thread():
    """Compute as the runs in processes of their own do, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(*options):
    """Run `gld-zoo distill` in this process, which saves the imports; return what it printed."""
    printed = io.StringIO()
    with one_thread(), contextlib.redirect_stdout(printed):
        cli([str(option) for option in options])
    return printed.getvalue()


@pytest.fixture
def distill(capsys):
    """Run `gld-zoo distill` in this process; returns what it printed, an error included."""

    def run(*options, fails=False):
        capsys.readouterr()
        message = ""
        expected = pytest.raises(SystemExit) if fails else contextlib.nullcontext()
        with one_thread(), expected as stop:
            cli([str(option) for option in options])
        if fails:
            message = str(stop.value.code)
            assert message != "0"
        printed = capsys.readouterr()
        return message + printed.out + printed.err

    return run


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory, tiny_dataset):
    """A finished run without a teacher, which the others distil from."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(*SMALL_RUN, "--dataset", tiny_dataset, "--run", folder)
    return folder


@pytest.fixture(scope="session")
def student_run(tmp_path_factory, tiny_dataset, teacher_run):
    """A finished run that distils from `teacher_run`."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    teacher = f"local-dir:{teacher_run}/last"
    output = train(*SMALL_RUN, "--teacher", teacher, "--dataset", tiny_dataset, "--run", folder)
    (folder / "printed.txt").write_text(output)
    return folder
