"""What people read first: links lead somewhere, code runs, and commands are taken as they stand."""

import importlib
import re
import shlex
from itertools import takewhile

import jsonargparse
import pytest

from gld_zoo.cli import TRAINING_COMMANDS, build_parser
from gld_zoo.training.commands.distill import teaches_photographs
from gld_zoo.training.config.command_line import parse_command
from gld_zoo.training.config.recipe import Recipe
from helpers import CHECKOUT

DOCUMENTS = [
    *(CHECKOUT / name for name in ("README.md", "MODEL_CARD.md", "CONTRIBUTING.md")),
    *sorted((CHECKOUT / "docs").glob("*.md")),
    *(CHECKOUT / name for name in ("figures/README.md", "benchmarks/README.md")),
    CHECKOUT / "benchmarks" / "EXPERIMENTS.md",
]
STARTERS = ("gld-zoo", "accelerate", "torchrun")


def blocks(language):
    for path in DOCUMENTS:
        found = re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)
        for number, block in enumerate(found):
            yield pytest.param(block, id=f"{path.relative_to(CHECKOUT)}-{number}")


def commands():
    """Every line of a shell's block that starts a program of ours."""
    for block in blocks("bash"):
        lines = block.values[0].replace("\\\n", " ").splitlines()
        for number, line in enumerate(lines):
            words = shlex.split(line, comments=True)
            while words and "=" in words[0]:
                words = words[1:]
            if words and words[0] in STARTERS:
                yield pytest.param(words, id=f"{block.id}-{number}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_links_lead_to_files_and_headings(path):
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", path.read_text()):
        target = path.parent / link if link else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{path.name}: {link}#{anchor}"


def anchors(path):
    """Return the anchors that a heading has on GitHub."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_heading_has_the_anchor_that_github_gives_it():
    assert "an-epoch-with-a-teacher-that-is-asked-once-storepy" in anchors(
        CHECKOUT / "benchmarks" / "README.md"
    )


def test_the_first_pages_are_short():
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= 120
    assert len((CHECKOUT / "MODEL_CARD.md").read_text().splitlines()) <= 80


def test_the_test_command_stands_where_continuous_integration_reads_it():
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    after = lines[lines.index("Run the tests:") :]
    assert after[1:5] == [
        "",
        "```bash",
        'pip install -e ".[dev]" && pytest -n 2 --dist loadfile',
        "```",
    ]


@pytest.mark.parametrize("block", list(blocks("python")))
def test_code_runs(block):
    exec(block, {})


class TakenError(Exception):
    """Options were parsed, and none was refused."""


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_taken_as_they_stand(words, monkeypatch, tmp_path):
    name, arguments = program(words)
    arguments = ["quickstart" if word == "RECIPE" else word for word in arguments]
    if "runs/photos-0/recipe.yaml" in arguments:  # which that run has written
        run = tmp_path / "runs" / "photos-0"
        run.mkdir(parents=True)
        options = ["--config", "photos", "--dataset", "FOLDER"]
        (run / "recipe.yaml").write_text(parse_command(Recipe, "", options).recipe.to_yaml())
        monkeypatch.chdir(tmp_path)
    if name == "distill":
        photographs = teaches_photographs([*arguments, "--run", "x"]) or "FOLDER" in arguments
        parse_command(Recipe, "", [*(["--config", "photos"] * photographs), *arguments])
        return
    if name not in TRAINING_COMMANDS:
        build_parser().parse_args([name, *arguments])
        return
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_alone(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise TakenError

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_alone)
    module = importlib.import_module(f"gld_zoo.training.commands.{name}")
    with pytest.raises(TakenError):
        module.cli(arguments)


def program(words):
    """Return the command that a line starts, behind a launcher perhaps, and its arguments."""
    if words[0] == "gld-zoo":
        return words[1], words[2:]
    at = next(i for i, word in enumerate(words) if word.startswith("gld_zoo.training."))
    launcher = list(takewhile(lambda word: word not in ("-m", "--"), words))
    assert all(word.startswith("--") for word in launcher[1:] if not word.isalnum()), words
    return words[at].rpartition(".")[2], words[at + 1 :]
