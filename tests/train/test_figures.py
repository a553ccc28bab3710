"""The supplement's figures: drawn from models and results as they are."""

import json

import pytest
import torch

import figures
from gld_zoo.results import Results
from helpers import assert_picture, row


def test_activations_have_a_column_a_model_and_a_row_an_image(tmp_path):
    models = dict(alone="gld_wrn16_1.ce_cifar100", GLD="gld_wrn16_1.wrn16_2_cifar100")
    figures.activations(models, tmp_path / "two.png", rows=[3, 5])
    figures.activations(dict(alone=models["alone"]), tmp_path / "one.png", rows=[3, 5, 8])
    two, one = (assert_picture(tmp_path / f"{name}.png") for name in ("two", "one"))
    assert two[0] > one[0]
    assert two[1] < one[1]


def test_concentration_is_the_share_above_half_of_each_maps_peak(monkeypatch, capsys):
    class Maps:
        def forward_features(self, images):
            maps = torch.zeros(len(images), 3, 4, 4)
            maps[:, 1, 0, :3] = 1.0
            maps[:, 2, 1, 0] = 2.0
            maps[:, 0, 2, 2] = 1.5
            maps[1::2] *= 7
            return maps

    monkeypatch.setattr(figures, "_model_and_inputs", lambda name, split: (Maps(), split.images))
    figures.concentration(dict(x="any"), images=30)
    assert capsys.readouterr().out == "x: 12.5% of 16 positions, mean of 30 images\n"


def test_images_come_in_the_order_asked_for_or_the_rows_there_are_named():
    _, split = figures._images(figures.BUNDLED, [999, 0])
    _, whole = figures._images(figures.BUNDLED, None)
    assert torch.equal(split.images, whole.images[[999, 0]])
    assert len(whole.labels) == 1000
    with pytest.raises(SystemExit, match=r"rows 0 to 999, not 1000"):
        figures.concentration({}, images=1001)


def test_local_predictions_are_the_models_own(tmp_path, monkeypatch):
    """A model that gives every row of an image another class is written cell by cell."""
    texts = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.text", lambda self, x, y, text, **_: texts.append((x, y, text))
    )
    expected = [[4, 0, 1, 2, 3]]

    def logits(model, inputs, grid):
        return 9.0 * torch.nn.functional.one_hot(torch.tensor(expected), 100)

    monkeypatch.setattr(figures, "global_local_logits", logits)
    out = tmp_path / "cells.png"
    figures.local_predictions(dict(x="gld_wrn16_1.ce_cifar100"), out, rows=[3])
    names = [text.partition("\n")[0] for *_, text in texts]
    assert names == ["apple", "aquarium fish", "baby", "bear"]
    assert [(x, y) for x, y, _ in texts] == [(7.5, 7.5), (23.5, 7.5), (7.5, 23.5), (23.5, 23.5)]
    assert out.stat().st_size > 0


def results(parts):
    (run,) = row().to_dict()["runs"]
    runs = {
        f"gld_wrn16_1.{part}": row(
            epochs=3, runs=[dict(run, top1=50.0 + i), dict(run, top1=52.0 + i)]
        ).to_dict()
        for i, part in enumerate(parts)
    }
    setup = {
        f"method_{part}": dict(model="gld_wrn16_1", weights=f"gld_wrn16_1.{part}") for part in parts
    }
    setup.update(teacher=dict(model="gld_wrn16_2"), gld=dict(model="gld_wrn16_1"))
    return dict(weights={}, runs=runs, setups=dict(b=setup))


def test_components_are_bars_of_the_mean_over_seeds(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    parts = ("alone", "global", "local", "relation", "gld")
    file.write_text(json.dumps(results(parts)))
    monkeypatch.setattr("gld_zoo.results.PATH", file)
    heights = []
    bar = figures.plt.Axes.bar

    def watched(self, names, means, **options):
        heights.append(dict(zip(names, means, strict=True)))
        return bar(self, names, means, **options)

    monkeypatch.setattr(figures.plt.Axes, "bar", watched)
    figures.components(tmp_path / "bars.png")
    assert heights == [{part: 51.0 + i for i, part in enumerate(parts)}]
    assert_picture(tmp_path / "bars.png")


def test_components_without_their_runs_say_what_to_record(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(("alone", "global"))))
    monkeypatch.setattr("gld_zoo.results.PATH", file)
    with pytest.raises(SystemExit) as stop:
        figures.components(tmp_path / "bars.png")
    assert "record their runs by train/release.py" in str(stop.value.code)
    assert not (tmp_path / "bars.png").exists()


def test_curves_are_the_lines_that_runs_wrote(tmp_path, monkeypatch):
    measured = dict(slow=[1.0, 2.5], fast=[4.0, 8.25])
    for label, values in measured.items():
        (tmp_path / label).mkdir()
        (tmp_path / label / "metrics.jsonl").write_text(
            "".join(
                json.dumps(dict(epoch=epoch, test_miou=value)) + "\n"
                for epoch, value in enumerate(values, start=1)
            )
        )
    drawn = {}
    plot = figures.plt.Axes.plot

    def watched(self, x, y, **options):
        drawn[options["label"]] = (x, y)
        return plot(self, x, y, **options)

    monkeypatch.setattr(figures.plt.Axes, "plot", watched)
    runs = {label: tmp_path / label for label in measured}
    figures.curves(runs, ["test_miou"], tmp_path / "curves.png")
    assert drawn == {"slow: 2.50": ([1, 2], [1.0, 2.5]), "fast: 8.25": ([1, 2], [4.0, 8.25])}
    assert_picture(tmp_path / "curves.png")


def test_curves_of_what_was_not_measured_say_what_was(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "test_miou": 3.0}\n')
    with pytest.raises(SystemExit) as stop:
        figures.curves(dict(x=tmp_path), ["test_top1"], tmp_path / "curves.png")
    assert "has no 'test_top1'; it has epoch, test_miou" in str(stop.value.code)
    with pytest.raises(SystemExit) as stop:
        figures.curves(dict(x=tmp_path / "none"), ["test_top1"], tmp_path / "curves.png")
    assert "none holds no run with an epoch done" in str(stop.value.code)
    assert not (tmp_path / "curves.png").exists()


def test_the_zoo_is_drawn_beside_the_public_ones(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.annotate", lambda self, text, place, *_, **__: labels.append(text)
    )
    figures.zoo(tmp_path / "zoo.png")
    assert_picture(tmp_path / "zoo.png")
    names = {name.partition(".")[0] for name in Results.load().rows}
    assert "tf_efficientnet_lite0" in names
    assert set(labels) == {name.removeprefix("gld_") for name in names if name.startswith("gld_")}
    best = figures._best_runs(distilled=False)["gld_resnet110"]
    assert best.runs[0].top1 == 67.34  # of two rows of the labels alone
