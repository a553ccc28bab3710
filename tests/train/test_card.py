"""The documents' tables and commands are those of results.json."""

import hashlib
import json
import shlex
from dataclasses import replace

import pytest
import timm
from timm.models import get_pretrained_cfg

from card import (
    DOCUMENTS,
    command,
    commands,
    epochs_of,
    fill,
    mean_of,
    methods_table,
    own_table,
    setups_table,
)
from gld_zoo import recipes
from gld_zoo.results import PATH as RESULTS_FILE
from gld_zoo.results import Results, Row
from gld_zoo.training.config.command_line import parse_command
from gld_zoo.training.config.recipe import Recipe
from helpers import CHECKOUT, row
from release import changes

PACKAGE = CHECKOUT / "gld_zoo"
RESULTS = Results.load()
CPU = "ACCELERATE_USE_CPU=true"
GPUS = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1"
# a teacher without a tag, which its recipe makes
NOT_SHIPPED = {"local-dir:runs/cifar100_96_lite0-0/last": "tf_efficientnet_lite0.ce_cifar100"}
TRAINED = RESULTS.rows


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_and_commands_are_those_of_the_results(path):
    text = path.read_text()
    assert "<!-- results:" in text
    assert fill(text, RESULTS) == text, "run `python train/card.py`"


def test_weights_have_a_file_of_that_hash_and_every_row_a_log_that_ends_there():
    tags = timm.list_models("gld_*", include_tags=True)
    assert set(RESULTS.weights) == {tag for tag in tags if get_pretrained_cfg(tag).has_weights}
    for each in RESULTS.weights.values():
        file = PACKAGE / "weights" / each.file
        assert hashlib.sha256(file.read_bytes()).hexdigest() == each.sha256
        assert file.stat().st_size < 25_000_000
    for name, each in TRAINED.items():
        lines = (PACKAGE / "weights" / f"{name}.metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        assert len(log) == each.epochs
        # the log is of the model as trained; the file may be in float16
        assert log[-1]["test_top1"] == pytest.approx(each.runs[0].top1, abs=0.05)
        assert each.test_images == (1_000 if "mini" in each.dataset else 10_000)
        assert each.recipe in recipes.names()
        assert each.runs[0].commit


def test_a_row_of_several_seeds_shows_their_mean_and_spread():
    (run,) = row().to_dict()["runs"]
    runs = [dict(run, top1=value) for value in (70.0, 71.0, 73.0)]
    assert row(runs=runs).mean() == mean_of(row(runs=runs)) == "71.33 ± 1.53"
    assert row(runs=runs[:1]).mean() == "70.00"
    assert mean_of(None) == "-"


def test_the_results_are_read_and_written_without_a_loss(monkeypatch, tmp_path):
    monkeypatch.setattr("gld_zoo.results.PATH", tmp_path / "results.json")
    RESULTS.save()
    assert Results.load() == RESULTS
    written, before = (
        json.loads(path.read_text()) for path in (tmp_path / "results.json", RESULTS_FILE)
    )
    assert written == before


def test_a_row_that_lacks_something_is_named():
    lacking = row().to_dict()
    del lacking["recipe"], lacking["runs"][0]["commit"]
    with pytest.raises(ValueError, match=r"results has no recipe, runs\[0\].commit, which a card"):
        Row.from_dict(lacking)
    with pytest.raises(ValueError, match=r"results has licence, which is none of dataset, "):
        Row.from_dict(dict(row().to_dict(), licence="mit"))
    with pytest.raises(ValueError, match=r"results has no teacher\.name"):
        Row.from_dict(dict(row().to_dict(), teacher=dict(sha256="x")))


def test_rows_are_credited_to_gld_by_what_their_recipe_says():
    for each in TRAINED.values():
        recipe = replace(Recipe.load(recipes.path_of(each.recipe)), **each.changes)
        assert each.by_gld == (recipe.teaches_by_gld or not recipe.teacher)


def test_each_run_has_one_command_that_is_its_recipe_with_its_changes():
    folders, found = set(), []
    for line in commands(RESULTS)[1:-1]:
        words = shlex.split(line)
        start = words.index("distill")
        repeat = parse_command(Recipe, "", words[start + 1 :])
        recipe = words[words.index("--config") + 1]
        name = repeat.recipe.teacher
        made = changes(
            repeat.recipe, Recipe.load(recipes.path_of(recipe)), name and dict(name=name)
        )
        teacher = NOT_SHIPPED.get(name, name)
        found.append((recipe, made, "ACCELERATE_MIXED_PRECISION=bf16" in words[:start], teacher))
        folders.add(repeat.run)
    expected = [
        (
            each.recipe,
            each.changes,
            each.precision == "bf16",
            each.teacher and each.teacher.name,
        )
        for each in TRAINED.values()
        for _ in each.runs
    ]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert len(folders) == len(expected)


def test_setups_of_our_own_have_a_table_of_their_own():
    role = dict(model="m", paper_top1=None, weights="m.a")
    setup = dict(dataset="birds", teacher=role, alone=role, gld=dict(role, weights=None))
    setups = dict(b=dict(setup, paper_epochs=200), own=dict(setup, paper_epochs=None))
    results = Results(setups, {"m.a": row(epochs=7)}, {})
    score = row().mean()
    assert own_table(results)[2:] == [f"| m → m | birds | 7, 7, - | {score} | {score} | - |"]
    paper = f"| b | m → m | 7, 7, - (200) | {score} (-) | {score} (-) | - (-) |"
    assert setups_table(results)[2:] == [paper]


def test_methods_stand_beside_the_labels_alone_with_what_a_step_costs(monkeypatch, tmp_path):
    (run,) = row().to_dict()["runs"]
    runs = {
        name: row(epochs=5, changes={}, runs=[dict(run, top1=top1)])
        for name, top1 in (("m.gld", 62.5), ("m.alone", 60.0))
    }
    roles = {f"method_{each}": dict(weights=f"m.{each}") for each in ("gld", "alone")}
    costs = tmp_path / "methods.json"
    measured = {"setup": "b", "times of alone": dict(alone=1.0, gld=1.834)}
    costs.write_text(json.dumps(measured))
    monkeypatch.setattr("card.STEPS", costs)
    no_baseline = dict(method_gld=roles["method_gld"])
    setups = dict(b=roles, c={}, d=no_baseline)
    alone, gld, elsewhere = methods_table(Results(setups, {}, runs))[2:]
    assert alone.startswith("| b | labels alone | ")
    assert alone.endswith(" | 5 | 60.00 | +0.00 | 1.00 |")
    assert gld.startswith("| b | GLD | ")
    assert gld.endswith(" | 5 | 62.50 | +2.50 | 1.83 |")
    assert elsewhere.startswith("| d | GLD | ")
    assert elsewhere.endswith(" | 5 | 62.50 | - | - |")


def test_a_row_that_goes_on_from_another_shows_the_epochs_of_both():
    trained = {"a.b": row(epochs=24)}
    trained["a.c"] = row(epochs=13, changes=dict(student="a.b"))
    assert epochs_of(trained["a.c"], trained) == "24 + 13"
    assert epochs_of(trained["a.b"], trained) == "24"
    assert epochs_of(None, trained) == "-"


@pytest.mark.parametrize(
    ("hardware", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", f"{GPUS} --mixed_precision bf16 --dynamo_backend no -m"),
        ("NVIDIA H200", "float32", f"{GPUS} --mixed_precision no --dynamo_backend no -m"),
        ("cpu", "float32", f"{CPU} torchrun --nproc_per_node 2 -m --"),
        ("cpu", "bf16", f"{CPU} ACCELERATE_MIXED_PRECISION=bf16 torchrun --nproc_per_node 2 -m --"),
    ],
)
def test_a_command_repeats_the_number_of_processes(hardware, precision, expected):
    made = row(hardware=hardware, precision=precision, processes=2)
    line = command("a.b", made, 0, own_folder=False)
    assert line == f"{expected} gld_zoo.training.distill --config x --seed 0"


def test_setups_name_weights_of_their_models():
    for setup in RESULTS.setups.values():
        for role in ("teacher", "alone", "gld"):
            name = setup[role]["weights"]
            assert name is None or name.split(".")[0] == setup[role]["model"]
