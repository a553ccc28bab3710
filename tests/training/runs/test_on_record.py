"""What stands in results.json beside a run: the same recipe on the labels alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from gld_zoo import recipes
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.runs.on_record import labels_alone

QUICKSTART = Recipe.load(recipes.path_of("quickstart"))


def test_the_quickstart_has_a_row_on_the_labels_alone_that_its_command_repeats():
    alone = labels_alone(QUICKSTART)
    assert alone is not None
    # neither the teacher nor what weighs it, the seed, or where the images lie is part of it
    assert labels_alone(replace(QUICKSTART, teacher="resnet34", alpha=0.5, seed=3)) == alone
    assert labels_alone(replace(QUICKSTART, dataset="elsewhere/cifar100_mini")) == alone


def test_another_schedule_or_another_dataset_has_a_row_of_its_own_or_none():
    for other in (dict(epochs=21), dict(lr=0.05), dict(dataset="mine"), dict(ema=0.99)):
        assert labels_alone(replace(QUICKSTART, **other)) is None


@pytest.mark.slow
def test_a_run_tells_what_distillation_brought(student_run, distill, monkeypatch, tmp_path):
    recipe = student_run / "recipe.yaml"
    printed = distill("--config", recipe, "--run", tmp_path / "none")
    assert "labels alone" not in printed
    monkeypatch.setattr("gld_zoo.training.tasks.distiller.labels_alone", lambda recipe: 12.5)
    printed = distill("--config", recipe, "--run", Path(tmp_path / "known"))
    top1 = float(printed.rpartition("student ")[0].rpartition("brought ")[2].split(" points")[0])
    assert "on the labels alone the same recipe gave 12.50 % (on record, one seed)" in printed
    assert f"{12.5 + top1:.2f} % after" in printed


def test_every_option_of_the_loss_is_known_to_need_a_teacher_or_not():
    """One that is forgotten would leave runs without the row on labels alone."""
    names = [field.name for field in Recipe.fields()]
    of_the_loss = set(names[names.index("grid") : names.index("epochs")])
    assert of_the_loss - set(Recipe.OF_A_TEACHER) == {"label_smoothing"}
