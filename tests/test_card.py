"""The documents: tables equal results.json, code blocks run, commands are those CI runs."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
from timm.models import get_pretrained_cfg

from card import DOCUMENTS, fill

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "gld_zoo"
RESULTS = json.loads((PACKAGE / "results.json").read_text())
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text()
    assert "<!-- results:" in text
    assert fill(text, RESULTS) == text, "run `python train/card.py`"


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block):
    exec(block, {})


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```bash\n(.*?)\n```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert commands[1] in (CHECKOUT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (CHECKOUT / link).exists(), f"{path.name}: {link}"


def test_every_weight_has_an_entry_a_file_of_that_hash_and_a_log_that_ends_there():
    tags = {
        name
        for name in timm.list_models("gld_*", include_tags=True)
        if get_pretrained_cfg(name).has_weights
    }
    assert set(RESULTS["weights"]) == tags
    for name, entry in RESULTS["weights"].items():
        file = PACKAGE / "weights" / entry["file"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
        assert file.stat().st_size < 25_000_000
        log = [
            json.loads(line)
            for line in (PACKAGE / "weights" / f"{name}.metrics.jsonl").read_text().splitlines()
        ]
        assert len(log) == entry["epochs"]
        assert log[-1]["test_top1"] == entry["runs"][0]["top1"]
        recipe = CHECKOUT / "train" / "recipes" / f"{entry['recipe']}.yaml"
        assert recipe.is_file()


def test_distilled_beats_alone_in_every_setup():
    for setup in RESULTS["paper"]:
        top1 = {
            entry["role"]: entry["runs"][0]["top1"]
            for entry in RESULTS["weights"].values()
            if entry["setup"] == setup
        }
        if {"alone", "gld"} <= top1.keys():
            assert top1["gld"] > top1["alone"]
