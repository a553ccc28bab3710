"""Recipes: one declaration, three sources, unknown keys refused, every shipped file usable."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator

from gld_zoo import create_deeplabv3plus, create_ssd300, recipes
from gld_zoo.training.commands.probe import cli
from gld_zoo.training.common.errors import RunError
from gld_zoo.training.config.command_line import parse_command
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.detector import DetectionRecipe
from gld_zoo.training.tasks.distiller import Distiller
from gld_zoo.training.tasks.segmenter import SegmentationRecipe
from helpers import CHECKOUT

FOLDER = recipes.FOLDER
PROBES = sorted(FOLDER.glob("linear_*.yaml"))
TRANSFERS = {
    "detect": (DetectionRecipe, sorted(FOLDER.glob("detect_*.yaml"))),
    "segment": (SegmentationRecipe, sorted(FOLDER.glob("segment_*.yaml"))),
}
OTHERS = [*PROBES, *TRANSFERS["detect"][1], *TRANSFERS["segment"][1]]
SIZES = dict(cifar100=32, quickstart=32, imagenet=224, flowers=224, dogs=224)
SIZES.update(cars=224, cub=224, photos=128)
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - set(OTHERS))


def load(path):
    """Return a recipe, with a dataset's name where it leaves that open."""
    is_open = "dataset: ???" in path.read_text()
    options = ["--config", str(path), *["--dataset", "FOLDER"] * is_open]
    return parse_command(Recipe, "", options).recipe


def kind_of(path):
    """Return a recipe's dataset, by its name."""
    return path.stem.partition("_")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_its_command_and_known_models(path):
    recipe = load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.endswith(f"gld-zoo distill --config {path.stem}") for line in header)
    assert timm.is_model(recipe.student)
    if recipe.teacher:
        assert timm.is_model(architecture(recipe.teacher)), recipe.teacher


@pytest.mark.parametrize("name", ["photos", "photos_teacher"])
def test_what_a_recipe_leaves_open_must_be_given(name, capsys):
    with pytest.raises(SystemExit):
        parse_command(Recipe, "", ["--config", name])
    assert "the recipe leaves dataset open; give --dataset (hub id" in capsys.readouterr().err


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_every_linear_recipe_names_its_command_and_runs(path, teacher_run, tiny_dataset, capsys):
    assert f"gld-zoo probe --config {path.stem} " in path.read_text()
    options = ["--config", path, "--model", teacher_run, "--dataset", tiny_dataset]
    cli([str(option) for option in options])
    assert "train images       64" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(TRANSFERS))
def test_every_transfer_recipe_parses_names_its_command_and_builds_its_model(name):
    kind, paths = TRANSFERS[name]
    assert len(paths) == 3
    for path in paths:
        recipe = kind.load(path)
        assert f"gld-zoo {name} --config {path.stem} " in path.read_text()
        backbone = architecture(recipe.backbone)
        if name == "detect":
            model = create_ssd300(backbone, pretrained_backbone=False)
        else:
            more = (recipe.num_classes, recipe.output_stride)
            model = create_deeplabv3plus(backbone, *more, pretrained_backbone=False)
        assert model.config["backbone"] == backbone


def test_every_recipe_that_is_spoken_of_is_there():
    texts = [*(CHECKOUT / "gld_zoo").rglob("*.py"), *CHECKOUT.glob("*.md")]
    texts += (CHECKOUT / "docs").glob("*.*")
    named = {
        name
        for path in texts
        for name in re.findall(r"--config ([a-z0-9_]+)(?![\w/])", path.read_text())
    }
    assert len(named) > 3
    assert named <= set(recipes.names())


def test_transfer_schedules_are_the_papers():
    voc = DetectionRecipe.load(FOLDER / "detect_voc.yaml")
    assert (voc.epochs, voc.batch_size, voc.weight_decay, voc.momentum) == (250, 32, 5e-4, 0.9)
    found = [voc.lr_at(epoch) for epoch in (0, 1, 2, 149.9, 150, 199.9, 200)]
    expected = [0, 5e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5]
    assert found == pytest.approx(expected)
    sbd = SegmentationRecipe.load(FOLDER / "segment_voc.yaml")
    assert (sbd.epochs, sbd.batch_size, sbd.image_size) == (50, 16, 513)
    assert sbd.lr_at(0) == 0.007
    assert sbd.lr_at(25) == pytest.approx(0.007 * 0.5**0.9)
    coco = SegmentationRecipe.load(FOLDER / "segment_coco.yaml")
    assert (coco.epochs, coco.lr) == (40, 0.001)


def architecture(teacher):
    """A teacher's architecture: the name's, or that of the recipe whose run it comes from."""
    if teacher.startswith("local-dir:"):
        run = Path(teacher.removeprefix("local-dir:")).parent.name
        return Recipe.load(RECIPES[0].with_name(f"{run.removesuffix('-0')}.yaml")).student
    return teacher.split(".")[0]


@pytest.mark.parametrize(
    "path",
    [
        # those of photographs take seconds
        pytest.param(path, marks=[] if SIZES.get(kind_of(path)) == 32 else [pytest.mark.slow])
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_every_recipe_builds_its_models_and_takes_a_step(path, tiny_dataset, tmp_path, monkeypatch):
    """At its own size and with its own crops, on four real images; weights here are random."""
    recipe = load(path)
    changes = dict(dataset=str(tiny_dataset), test_split=None, batch_size=4, workers=0)
    recipe = replace(recipe, **changes, teacher_store=None)
    if path.stem == "photos_teacher":
        recipe = replace(recipe, student="convnext_atto", image_size=64)

    def create(name, **options):
        return timm.create_model(architecture(name), **dict(options, pretrained=False))

    monkeypatch.setattr("gld_zoo.training.build.create.create_model", create)
    monkeypatch.setattr("gld_zoo.training.build.run_models.create_frozen", build_teacher)
    run = RunFolder(tmp_path / "run", recipe, resume=False)
    trainer = Trainer(Distiller(recipe, Accelerator(cpu=True)), run)
    run.path.mkdir()
    if recipe.teacher_head == "fit":
        trainer.task.prepare(run.path)
    trainer.task.network.train()
    images, target = next(trainer.data.train.epoch(0))
    enlarged = re.match(r"cifar100_(\d+)_", path.stem)
    size = int(enlarged[1]) if enlarged else recipe.image_size or SIZES[kind_of(path)]
    assert images.shape == (4, 3, size, size)
    weight = trainer.task.student.get_classifier().weight
    before = weight.detach().clone()
    terms, _ = trainer.step(images, target)
    assert terms["loss"].isfinite()
    assert not torch.equal(weight, before)
    assert len(terms) == (5 if recipe.teacher else 2)


def build_teacher(name, device, *, role):
    teacher = timm.create_model(architecture(name), num_classes=4)  # those of `tiny_dataset`
    return teacher.eval().requires_grad_(False)


def test_defaults_are_the_papers_cifar_setting():
    recipe = Recipe(student="gld_resnet20")
    expected = dict(
        epochs=200,
        batch_size=64,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        grid=2,
        alpha=0.7,
        beta=500.0,
    )
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert [recipe.lr_at(epoch) for epoch in (0, 99, 100, 149, 150, 199)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(1, [0.1]), (2, [0.1, 0.01]), (3, [0.1, 0.1, 0.001]), (5, [0.1, 0.1, 0.1, 0.01, 0.001])],
)
def test_short_schedules_begin_at_the_full_rate(epochs, rates):
    recipe = Recipe(student="gld_resnet20", epochs=epochs)
    assert [recipe.lr_at(epoch) for epoch in range(epochs)] == pytest.approx(rates)


def test_no_drop_comes_before_the_first_epoch_is_done():
    recipe = Recipe(student="gld_resnet20", epochs=2, lr_drops=[0.1, 0.2])
    assert [recipe.lr_at(epoch) for epoch in (0, 0.9, 1)] == pytest.approx([0.1, 0.1, 0.001])


def test_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("student: gld_resnet20\nlr: 5e-2\nepochs: 7\n")
    for given in (["--config", str(path), "--epochs", "3"], ["--epochs", "3", f"--config={path}"]):
        command = parse_command(Recipe, "", given)
        recipe = command.recipe
        assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.05, 3, 64)
        assert command.run == Path("runs/mine-0")
        assert not command.resume


def test_a_run_goes_on_with_its_own_recipe_under_what_is_given(tmp_path):
    (tmp_path / "recipe.yaml").write_text("student: gld_resnet20\nlr: 5e-2\n")
    given = ["--student", "gld_resnet20", "--resume", "--threads", "1", "--run", str(tmp_path)]
    recipe = parse_command(Recipe, "", given).recipe
    assert (recipe.lr, recipe.threads) == (0.05, 1)


def test_saved_recipe_reads_back_the_same(tmp_path):
    recipe = Recipe(
        student="gld_resnet20",
        weight_decay=1e-5,
        lr_drops=[0.3, 0.6, 0.9],
        teacher="local-dir:runs/x/last",
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert parse_command(Recipe, "", ["--config", str(tmp_path / "recipe.yaml")]).recipe == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: gld_resnet20\nepoch: 3\n", "epoch"),
        ("student: gld_resnet20\nepochs: soon\n", "epochs"),
        ("student: gld_resnet20\nlr_drops: [0.5, 1.5]\n", "lr_drops"),
        ("student: gld_resnet20\nbatch_size: 0\n", "batch_size=0"),
        ("student: gld_resnet20\nbatch_size:\n", "batch_size has no value"),
        ("epochs: 3\n", "student"),
    ],
)
def test_mistakes_in_a_recipe_end_the_program_and_are_named(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse_command(Recipe, "", ["--config", str(path)])
    assert stop.value.code != 0
    assert message in capsys.readouterr().err.rpartition("error: ")[2]  # the usage comes before


def test_a_folder_without_a_run_cannot_be_resumed_by_its_name_alone(tmp_path):
    with pytest.raises(SystemExit, match="typo holds no run to resume"):
        parse_command(Recipe, "", ["--run", str(tmp_path / "typo"), "--resume"])
    options = ["--run", str(tmp_path / "new"), "--resume", "--student", "gld_resnet20"]
    assert parse_command(Recipe, "", options).recipe.student == "gld_resnet20"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_command(Recipe, "", ["--help"])
    text = capsys.readouterr().out
    for name in (field.name for field in Recipe.fields()):
        assert f"--{name} " in text
    for title in Recipe.GROUPS.values():
        assert f"\n{title}:\n" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# r\xe9solu\nstudent: gld_resnet20\n", r"is not in UTF-8 \(line 1\); save it as UTF-8"),
        (b"student: gld_resnet20\n# K\xf6ln\n", r"is not in UTF-8 \(line 2\); save it as UTF-8"),
        (None, "No such file or directory; name a YAML file that can be read"),
        ("folder", "Is a directory; name a YAML file that can be read"),
        ("link", "symbolic links; name a YAML file that can be read"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    if content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to(path)
    elif content:
        path.write_bytes(content)
    expected = f"{re.escape(str(path))}.*{message}"
    for given in (["--config", str(path)], ["--epochs", "3", f"--config={path}"]):
        with pytest.raises(SystemExit, match=f"^error: .*{expected}$"):
            parse_command(Recipe, "", given)
    with pytest.raises(ValueError, match=expected):
        Recipe.load(path)


def test_a_saved_recipe_that_cannot_be_read_is_named(tmp_path):
    recipe = Recipe(student="gld_resnet20")
    (tmp_path / "recipe.yaml").write_bytes(b"# K\xf6ln\n")
    with pytest.raises(SystemExit, match=r"recipe.yaml is not in UTF-8"):
        parse_command(Recipe, "", ["--run", str(tmp_path), "--resume"])
    with pytest.raises(RunError, match=r"recipe.yaml is not in UTF-8"):
        RunFolder(tmp_path, recipe, resume=True)


def test_options_may_stand_in_a_files_place():
    assert parse_command(Recipe, "", ["--config", "{student: x, lr: 0.3}"]).recipe.lr == 0.3
    with pytest.raises(SystemExit, match="there is no recipe 'xxx"):
        parse_command(Recipe, "", ["--config", "x" * 300])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/recipes/quickstart.yaml", "part of the package: name it by --config quickstart"),
        ("quickstart.yaml", "part of the package: name it by --config quickstart"),
        ("quikstart", "there is no recipe 'quikstart'; the nearest: quickstart"),
        ("detect_coco128", "detect_coco128 is a recipe of gld-zoo detect"),
        ("", "the name of the recipe is empty"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_its_name(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        parse_command(Recipe, "", ["--config", name], "gld-zoo distill")


def test_a_name_is_the_packages_recipe_and_a_path_the_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("student: mine")
    command = parse_command(Recipe, "", ["--config", "quickstart"])
    assert (command.recipe.student, str(command.run)) == ("gld_wrn16_1", "runs/quickstart-0")
    assert parse_command(Recipe, "", ["--config", "./quickstart"]).recipe.student == "mine"
