"""Exports: a hub folder that says what its own files score, and holds nothing of the machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from gld_zoo.model_card import model_card
from gld_zoo.results import TeacherRecord
from gld_zoo.training.commands.export import cli
from gld_zoo.training.common.disk import sha256
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Normalize
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.publish import onnx_files
from gld_zoo.training.publish.onnx_files import OnnxModel
from gld_zoo.training.runs.finished_run import FinishedRun
from helpers import FEATURES, SMALL_RUN, read_lines, row, write_dataset


@pytest.fixture
def export(capsys):
    """Run `gld-zoo export`; return what it printed, or the error it ended with."""

    def run(*options, fails=False):
        capsys.readouterr()
        if not fails:
            cli([str(option) for option in options])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            cli([str(option) for option in options])
        return str(stop.value.code)

    return run


def scores(folder):
    card = ModelCard.load(folder / "README.md")
    return {result.metric_name: result.metric_value for result in card.data.eval_results}


def test_an_export_is_the_runs_own_bits_with_card_recipe_and_log(student_run, export, tmp_path):
    folder = tmp_path / "out" / "mine"
    export(student_run, folder, "--license", "mit")
    names = ["README.md", "config.json", "metrics.jsonl", "model.safetensors", "recipe.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == names
    last = student_run / "last" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == last.read_bytes()
    summary = json.loads((student_run / "summary.json").read_text())
    assert scores(folder) == {"Top-1": summary["top1"], "Top-5": summary["top5"]}
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert (folder / "metrics.jsonl").read_text() == (student_run / "metrics.jsonl").read_text()
    for name in ("README.md", "config.json", "recipe.yaml"):  # folders of the machine stay there
        assert str(student_run.parent.parent) not in (folder / name).read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["apple", "aquarium_fish", "baby", "bear"]


def test_a_card_names_teacher_and_classes(student_run, export, tmp_path):
    export(student_run, tmp_path / "mine")
    text = ModelCard.load(tmp_path / "mine" / "README.md").text
    top1 = json.loads((student_run / "summary.json").read_text())["teacher"]["top1"]
    teacher = Recipe.load(student_run / "recipe.yaml").teacher.removeprefix("local-dir:")
    architecture = json.loads((Path(teacher) / "config.json").read_text())["architecture"]
    assert f"distilled by GLD from `{architecture}` (top-1 {top1:.2f} %)" in text
    assert "It knows 4 classes: apple, aquarium_fish, baby, bear." in text
    assert "`recipe.yaml` beside this card holds every option" in text


def test_a_card_credits_gld_with_its_own_students_alone(teacher_run, export, tmp_path):
    export(teacher_run, tmp_path / "alone")
    alone = ModelCard.load(tmp_path / "alone" / "README.md")
    assert "trained by gld_zoo on the labels alone." in alone.text
    assert "knowledge-distillation" not in alone.data.tags
    for by_gld in (True, False):
        results = row(teacher=dict(name="resnet18"), by_gld=by_gld).to_dict()
        card = model_card(timm.create_model("gld_wrn16_1"), results, "org/name")
        method = "distilled by GLD from" if by_gld else "distilled from"
        assert f"{method} `resnet18` with gld_zoo" in card.text
        assert ("Kim et al." in card.text) == by_gld
        assert "knowledge-distillation" in card.data.tags


@pytest.mark.parametrize(
    "changes",
    [
        dict(teacher=None),
        dict(teacher_head="none", beta=1.0),
        dict(beta=0.0),
        dict(local_weight=0.0),
        dict(global_weight=0.0),
        dict(alpha=0.0),
        dict(standardise=False),
        dict(temperature=4.0),
        dict(disagreement=2.0),
    ],
)
def test_what_teaches_otherwise_is_not_by_gld(student_run, changes):
    finished = FinishedRun.load(student_run)
    assert finished.description()["by_gld"]
    other = replace(finished, recipe=replace(finished.recipe, **changes))
    assert not other.recipe.teaches_by_gld
    assert other.description()["by_gld"] == (other.recipe.teacher is None)  # nothing is claimed


def test_a_card_tells_of_a_head_that_was_fitted():
    recipe = Recipe(student="x", teacher="resnet18", teacher_head="fit", dataset="birds")
    summary = dict(dataset="birds", dataset_is_folder=True, teacher=dict(sha256="0", top1=70.0))
    teacher = FinishedRun(Path("x"), recipe, summary, {}).teacher()
    told = TeacherRecord(**teacher)
    assert (told.name, told.top1, told.fitted_head) == ("resnet18", 70.0, True)


def test_a_card_states_no_licence_nor_dataset_that_nobody_named(student_run, export, tmp_path):
    export(student_run, tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license is None
    assert card.data.datasets is None
    assert "none is stated" in card.text
    assert "CIFAR" not in card.text


def test_a_recipe_for_others_has_no_folder_of_this_machine():
    recipe = Recipe(student="local-dir:/home/me/s/last", finetune="all", dataset="~/birds")
    taught = dict(teacher="local-dir:/home/me/t/last", views=2, teacher_store="/home/me/store")
    summary = dict(dataset="~/birds", dataset_is_folder=True)
    portable = FinishedRun(Path("x"), replace(recipe, **taught), summary, {}).portable()
    assert (portable.student, portable.dataset) == ("local-dir:s/last", "birds")
    assert (portable.teacher, portable.teacher_store) == ("local-dir:t/last", "auto")
    assert FinishedRun(Path("x"), recipe, summary, {}).portable().teacher_store is None
    summary = dict(dataset="org/birds", dataset_is_folder=False)
    assert FinishedRun(Path("x"), recipe, summary, {}).dataset == "org/birds"


def test_float16_is_measured_anew(student_run, tiny_dataset, export, tmp_path):
    export(student_run, tmp_path / "half", "--float16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim >= 2} == {torch.float16}
    model = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True).eval()
    assert scores(tmp_path / "half")["Top-1"] == pytest.approx(top1(model, tiny_dataset))


def top1(model, dataset):
    rows = ImageSource(str(dataset)).test
    config = timm.data.resolve_model_data_config(timm.create_model("gld_wrn16_1"))
    normalize = Normalize(config["mean"], config["std"], torch.device("cpu"))
    hits = 0
    for item in rows.table:
        image = rows.read(item[rows.image_column], "here")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3)
        hits += int(model(normalize(pixels)).argmax() == item[rows.label_column])
    return 100 * hits / len(rows)


@pytest.mark.slow
def test_onnx_files_score_what_the_card_says(student_run, tiny_dataset, export, tmp_path):
    for library in onnx_files.PACKAGES:
        pytest.importorskip(library)
    import onnx

    folder = tmp_path / "onnx"
    printed = export(student_run, folder, "--onnx", "--int8")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            OnnxModel(folder / "model.onnx")(images), model(images), rtol=1e-4, atol=1e-4
        )
    measured = top1(OnnxModel(folder / "model.int8.onnx"), tiny_dataset)
    assert f"model.int8.onnx {measured:.2f} %" in printed
    assert f"8 bits, top-1 {measured:.2f} %" in (folder / "README.md").read_text()
    small, large = ((folder / f"model{kind}.onnx").stat().st_size for kind in (".int8", ""))
    assert small < large / 2
    told = {prop.key: prop.value for prop in onnx.load(folder / "model.onnx").metadata_props}
    config = timm.data.resolve_model_data_config(model)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    expected = {key: config[key] for key in keys} | dict(label_names=FEATURES["fine_label"].names)
    found = {key: json.loads(value) for key, value in told.items()}
    assert found == json.loads(json.dumps(expected))


def test_weights_selected_on_held_out_images_are_measured(
    distill, tiny_dataset, export, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--run", run, "--val_fraction", 0.25]
    distill(*options)
    export(run, tmp_path / "best", "--weights", "best")
    summary = json.loads((run / "summary.json").read_text())
    assert scores(tmp_path / "best")["Top-1"] == pytest.approx(summary["best_top1"])
    best = max(line["val_top1"] for line in read_lines(run / "metrics.jsonl"))
    text = " ".join((tmp_path / "best" / "README.md").read_text().split())
    monkeypatch.setattr(
        "gld_zoo.training.publish.hub_folder.evaluate", lambda *_, **__: dict(top1=12.0, top5=34.0)
    )
    export(run, tmp_path / "again", "--weights", "best")
    assert scores(tmp_path / "again") == {"Top-1": 12.0, "Top-5": 34.0}
    found = f"best one on the val images was epoch {summary['best_epoch']} with {best:.2f} %"
    assert f"the weights are those of the best epoch, and the run's {found}" in text


def test_a_streamed_run_is_exported_too(distill, rows, export, tmp_path):
    folder, run = write_dataset(tmp_path / "data", rows), tmp_path / "run"
    options = ["--streaming", "true", "--train_images", 64, "--workers", 0, "--epochs", 1]
    options += ["--shuffle_buffer", 32]
    distill(*SMALL_RUN, "--dataset", folder, "--run", run, *options)
    export(run, tmp_path / "hub", "--float16")
    top1 = json.loads((run / "summary.json").read_text())["top1"]
    assert scores(tmp_path / "hub")["Top-1"] == pytest.approx(top1, abs=3)


def test_mistakes_are_named_and_nothing_is_written(student_run, export, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert "holds no finished run" in export(tmp_path, folder, fails=True)
    assert "holds no model" in export(student_run, folder, "--weights", "best", fails=True)
    monkeypatch.chdir(tmp_path)
    assert "is the current folder" in export(student_run, ".", fails=True)
    message = export(student_run, folder, "--float16", "--dataset", "nowhere", fails=True)
    assert "dataset='nowhere'" in message
    message = export(student_run, folder, "--push", "a/b/c", fails=True)
    assert "a/b/c" in message
    monkeypatch.setattr(onnx_files, "PACKAGES", ("not_there",))
    message = export(student_run, folder, "--onnx", fails=True)
    assert "ONNX needs not_there; pip install not_there" in message
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert f"{folder} is already there" in export(student_run, folder, fails=True)
    assert (folder / "mine").read_text() == "kept"


@pytest.mark.slow
def test_an_onnx_file_that_is_not_the_model_is_refused(tmp_path, monkeypatch):
    for library in onnx_files.PACKAGES:
        pytest.importorskip(library)
    model = timm.create_model("gld_resnet20", num_classes=3).eval()
    config = timm.data.resolve_model_data_config(model)
    right = OnnxModel.__call__
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, images: right(self, images) + 1e-2)
    with pytest.raises(ModelError, match="differ from torch's"):
        onnx_files.write_onnx(model, tmp_path / "x.onnx", config, list("abc"))


def test_a_cards_numbers_are_those_of_its_file(student_run, export, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gld_zoo.training.publish.hub_folder.evaluate", lambda *_, **__: dict(top1=12.0, top5=34.0)
    )
    export(student_run, tmp_path / "half", "--float16")
    assert scores(tmp_path / "half") == {"Top-1": 12.0, "Top-5": 34.0}
    card = (tmp_path / "half" / "README.md").read_text()
    assert sha256(tmp_path / "half" / "model.safetensors") in card
