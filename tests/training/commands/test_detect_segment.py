"""`gld-zoo detect`, `segment` and `draw`: they learn, resume, and agree."""

import json
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import moved_boxes
from gld_zoo.downstream.detection import create_ssd300
from gld_zoo.downstream.saving import load_downstream
from gld_zoo.hub import create_model
from gld_zoo.training.commands import detect, draw, export, segment
from gld_zoo.training.measure.drawing import draw_boxes
from gld_zoo.training.runs.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from gld_zoo.training.tasks import detector, segmenter
from helpers import launch, read_lines
from scenes import detection_rows, scene, segmentation_rows, write_detection, write_segmentation

BACKBONE = ["--backbone", "mobilenetv3_small_050", "--pretrained", "false", "--threads", 1]
DETECT = [*BACKBONE, "--workers", 0, "--epochs", 2, "--batch_size", 4, "--lr", 0.01]
SEGMENT = [*BACKBONE, "--workers", 0, "--epochs", 8, "--batch_size", 4, "--lr", 0.1]
SEGMENT += ["--num_classes", 4, "--image_size", 96, "--label_names", "[none, red, green, blue]"]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    splits = dict(train=detection_rows(range(8)), test=detection_rows(range(8, 13)))
    return write_detection(tmp_path_factory.mktemp("boxes"), splits)


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    splits = dict(train=segmentation_rows(range(12)), test=segmentation_rows(range(12, 17)))
    return write_segmentation(tmp_path_factory.mktemp("masks"), splits)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, boxes, masks):
    """A finished run of each, in this process."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    run(detect, *DETECT, "--dataset", boxes, "--run", folder / "detect")
    run(segment, *SEGMENT, "--dataset", masks, "--run", folder / "segment")
    torch.set_num_threads(threads)
    return folder


def run(module, *options):
    module.cli([str(option) for option in options])


def fails(module, *options):
    with pytest.raises(SystemExit) as stop:
        run(module, *options)
    return str(stop.value.code)


@pytest.mark.slow
def test_a_detection_run_is_whole(runs):
    folder = runs / "detect"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["train_boxes"], summary["test_boxes"]) == (16, 10)
    assert {"ap", "ap50", "voc07", "best_epoch_ap50"} <= summary.keys()
    lines = read_lines(folder / "metrics.jsonl")
    assert {"loss", "loss_box", "loss_class", "test_loss", "test_ap50"} <= lines[0].keys()
    assert lines[-1]["test_loss"] < lines[0]["test_loss"]
    assert (folder / "curves.png").stat().st_size > 5000
    model = load_downstream(folder / "last")
    assert model.config["label_names"] == ["red", "green", "blue"]


@pytest.mark.slow
def test_a_segmentation_run_learns(runs):
    folder = runs / "segment"
    summary = json.loads((folder / "summary.json").read_text())
    lines = read_lines(folder / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert summary["miou"] > 40
    assert lines[-1]["lr"] == pytest.approx(0.1 * (1 - (8 - 1 / 3) / 8) ** 0.9)
    # the same number from the saved model, worked out by hand
    model = load_downstream(folder / "last")
    matrix = np.zeros((4, 4))
    config = segmenter.resolve_model_data_config(model.backbone)
    for image, mask in segmentation_rows(range(12, 17)):
        scaled = (torch.from_numpy(image).permute(2, 0, 1) / 255)[None]
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        with torch.no_grad():
            guess = model((scaled - mean) / std).argmax(1)[0].numpy()
        np.add.at(matrix, (mask, guess), 1)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    expected = (matrix.diagonal()[union > 0] / union[union > 0]).mean()
    assert summary["miou"] == pytest.approx(100 * expected, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options"),
    [(detect, DETECT), pytest.param(segment, SEGMENT, marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    runs, boxes, masks, tmp_path, module, options, capsys
):
    dataset = boxes if module is detect else masks
    name = module.__name__.rpartition(".")[2]
    target = ["--run", tmp_path / "run"]
    threads = torch.get_num_threads()
    run(module, *options, "--dataset", dataset, *target, "--max_minutes", 0)
    assert "stopped by max_minutes at step 1 of epoch 1" in capsys.readouterr().out
    run(module, *target, "--resume", "--max_minutes", "null")
    torch.set_num_threads(threads)
    for file in ("last/model.safetensors", "last/config.json"):
        assert (tmp_path / "run" / file).read_bytes() == (runs / name / file).read_bytes()
    pairs = zip(
        *(read_lines(f / "metrics.jsonl") for f in (tmp_path / "run", runs / name)), strict=True
    )
    for line, expected in pairs:
        for key in line.keys() - {"seconds", "images_per_second"}:
            assert line[key] == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "program"), [(detect, "moved_boxes"), (segment, "gld_zoo.training.segment")]
)
def test_two_processes_measure_what_one_does(runs, tmp_path, monkeypatch, module, program):
    """A run whose last epoch was not measured is measured at its end by those who resume it."""
    monkeypatch.setattr(detector, "losses_and_detections", moved_boxes.losses_and_detections)
    summaries = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        shutil.copytree(runs / module.__name__.rpartition(".")[2], folder)
        (folder / "summary.json").unlink()
        newest = list_checkpoints(folder / "checkpoints")[-1]
        tensors, state = load_checkpoint(newest)
        unmeasured = {name for name in state["history"][-1] if name.startswith("test_")}
        for name in unmeasured:
            del state["history"][-1][name]
        save_checkpoint(folder / "checkpoints", newest.name, tensors, state, keep=2)
        if processes == 1:
            threads = torch.get_num_threads()
            run(module, "--run", folder, "--resume")
            torch.set_num_threads(threads)
        else:
            launch("--run", folder, "--resume", processes=2, module=program)
        summaries.append(json.loads((folder / "summary.json").read_text()))
    one, two = summaries
    score = one["ap" if module is detect else "miou"]
    assert 20 < score < 95
    assert one["test_loss"] > 0
    assert one.keys() == two.keys()
    for key in one.keys() - {"seconds", "dataset", "best_epoch_split"}:
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


def voc07(guess, truth):
    options = dict(iou_thresholds=[0.5], rec_thresholds=detector.VOC07_RECALLS)
    return detector.average_precision([guess], [truth], **options)["map"].item()


def test_difficult_objects_neither_help_nor_hurt():
    truth = dict(
        boxes=torch.tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]]),
        labels=torch.tensor([1, 1]),
        iscrowd=torch.tensor([0, 1]),
    )
    found = dict(boxes=truth["boxes"][:1], labels=torch.tensor([1]), scores=torch.tensor([0.9]))
    both = dict(boxes=truth["boxes"], labels=torch.tensor([1, 1]), scores=torch.tensor([0.9, 0.95]))
    for guess in (found, both):
        assert voc07(guess, truth) == pytest.approx(1.0)


def test_voc07_is_the_mean_precision_at_11_recalls():
    """Of two objects the better guess is wrong: precision 1/2 up to recall 1/2, then 0."""
    truth = dict(
        boxes=torch.tensor([[0.0, 0.0, 40.0, 40.0], [50.0, 50.0, 90.0, 90.0]]),
        labels=torch.tensor([1, 1]),
    )
    guess = dict(
        boxes=torch.tensor([[0.0, 50.0, 40.0, 90.0], [0.0, 0.0, 40.0, 40.0]]),
        labels=torch.tensor([1, 1]),
        scores=torch.tensor([0.9, 0.8]),
    )
    assert voc07(guess, truth) == pytest.approx(6 * 0.5 / 11)


def test_a_mask_that_ignores_all_costs_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmenter.pixel_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_mean_iou_leaves_out_classes_that_never_occur():
    matrix = torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert segmenter.mean_iou(matrix) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert segmenter.mean_iou(torch.zeros(2, 2)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (detect, ["--backbone", "gld_wrn16_1"], "has maps at strides [1, 2, 4]"),
        (detect, ["--backbone", "gld_resnet34", "--pretrained", "true"], "No pretrained weights"),
        (detect, ["--batch_size", 9], "fewer than batch_size=9"),
        (detect, ["--dataset", "nowhere"], "there is no such folder"),
        (segment, ["--batch_size", 1], "batch norm of the image-level features needs two"),
        (segment, ["--num_classes", 2, "--label_names", "[]"], "set num_classes or mend it"),
        (segment, ["--mask_column", "labels"], "mask_column='labels' is not a column"),
    ],
)
def test_mistakes_end_with_one_line(boxes, masks, tmp_path, module, options, message):
    usual, dataset = (DETECT, boxes) if module is detect else (SEGMENT, masks)
    options = [*usual, "--dataset", dataset, "--run", tmp_path / "run", *options]
    assert message in fails(module, *options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detect", "segment"])
def test_predictions_are_drawn(runs, tmp_path, name, capsys):
    image, *_ = scene(3)
    Image.fromarray(image).save(tmp_path / "scene.jpg")
    (tmp_path / "broken.png").write_bytes(b"no image")
    out = tmp_path / "drawn"
    options = [runs / name, tmp_path, "--out", out, "--threshold", 0.01]
    assert fails(draw, *options) == "1"
    printed = capsys.readouterr()
    assert "broken.png: skipped" in printed.err
    assert "scene.jpg: " in printed.out
    (drawn,) = out.iterdir()
    pixels = np.asarray(Image.open(drawn))
    assert (pixels[:72, :96] != image).any()


@pytest.mark.slow
def test_images_of_one_name_are_drawn_apart(runs, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(scene(3)[0]).save(tmp_path / folder / "scene.png")
    options = [runs / "segment", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "drawn"]
    assert fails(draw, *options) == "0"
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["scene-1.png", "scene.png"]
    (tmp_path / "b" / "scene.png").rename(tmp_path / "b" / "scene-1.png")
    Image.fromarray(scene(3)[0]).save(tmp_path / "b" / "scene.png")
    options[-1] = tmp_path / "more"
    assert fails(draw, *options) == "0"
    assert len(list((tmp_path / "more").iterdir())) == 3


@pytest.mark.slow
def test_drawings_never_take_the_place_of_images(runs, tmp_path):
    Image.fromarray(scene(3)[0]).save(tmp_path / "scene.png")
    before = (tmp_path / "scene.png").read_bytes()
    message = fails(draw, runs / "segment", tmp_path / "*.png", "--out", tmp_path)
    assert "holds scene.png, an image to draw; name another folder" in message
    assert (tmp_path / "scene.png").read_bytes() == before


@pytest.mark.slow
def test_what_is_no_run_of_distill_is_not_exported_as_one(runs, tmp_path):
    message = fails(export, runs / "segment", tmp_path / "out")
    assert "holds no run of gld-zoo distill" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_segmenter_is_not_taken_for_a_classifier(runs):
    with pytest.raises(ValueError, match="no 'architecture', so it is not the folder of a timm"):
        create_model(f"local-dir:{runs / 'segment' / 'last'}", pretrained=True)


@pytest.mark.slow
def test_nothing_to_draw_is_an_error(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    message = fails(draw, runs / "segment", tmp_path, "--out", tmp_path / "drawn")
    assert f"no image in {tmp_path}" in message


def test_a_folder_without_a_model_is_named(tmp_path):
    message = fails(draw, tmp_path, "x.png", "--out", tmp_path / "out")
    assert "holds no whole detector or segmenter" in message


@pytest.mark.slow
@torch.no_grad()
def test_default_boxes_are_exact_under_autocast(runs):
    """Matching and encoding in training must see the boxes that detections are decoded by."""
    model = load_downstream(runs / "detect" / "last").train()
    images = [torch.rand(3, 72, 96)] * 2
    targets = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))] * 2
    exact = detector._Batch(model, images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detector._Batch(model, images, targets)
    assert torch.equal(torch.stack(exact.boxes), torch.stack(rounded.boxes))


@pytest.mark.slow
@pytest.mark.parametrize(("module", "options"), [(detect, DETECT), (segment, SEGMENT)])
def test_workers_read_the_same_images(boxes, masks, tmp_path, monkeypatch, module, options):
    """Nothing that a worker sent is kept, as each tensor holds a file open, and none outlives."""
    average = detector.average_precision

    def watched(guesses, truths, **others):
        assert not any(value.is_shared() for truth in truths for value in truth.values())
        return average(guesses, truths, **others)

    monkeypatch.setattr(detector, "average_precision", watched)
    dataset = boxes if module is detect else masks
    threads = torch.get_num_threads()
    weights = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        changes = ["--workers", workers, "--epochs", 1, "--run", folder]
        run(module, *options, "--dataset", dataset, *changes)
        weights.append((folder / "last" / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert weights[0] == weights[1]
    assert not multiprocessing.active_children()


def test_a_mask_that_ignores_all_counts_nowhere(tmp_path, capsys):
    (image, mask), *rows = segmentation_rows(range(5))
    threads = torch.get_num_threads()
    test = dict(a=[(image, mask)], b=[(image, mask), (image, np.full_like(mask, 255))])
    losses = {}
    for name, split in test.items():
        (tmp_path / name).mkdir()
        folder = write_segmentation(tmp_path / name, dict(train=rows, test=split))
        options = ["--dataset", folder, "--run", tmp_path / f"run-{name}", "--epochs", 1]
        run(segment, *SEGMENT, *options)
        torch.set_num_threads(threads)
        losses[name] = json.loads((tmp_path / f"run-{name}/summary.json").read_text())["test_loss"]
    assert losses["a"] == losses["b"] > 0
    assert "classes beside 255" not in capsys.readouterr().out


def test_masks_of_0_and_255_end_the_run_before_it_begins(tmp_path):
    rows = [
        (image, np.where(mask > 0, 255, 0).astype(np.uint8))
        for image, mask in segmentation_rows(range(5))
    ]
    folder = write_segmentation(tmp_path, dict(train=rows, test=rows[:1]))
    message = fails(segment, *SEGMENT, "--dataset", folder, "--run", tmp_path / "run")
    assert "hold the value 0 alone beside 255, which is ignored" in message
    assert not (tmp_path / "run").exists()


def task_of_one(**more):
    """What `measure` needs of a task in one process."""
    machine = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    return SimpleNamespace(share_buffers=lambda model: None, accelerator=machine, **more)


def test_each_precision_has_its_own_name(monkeypatch):
    """One object found at an IoU of 0.62, and a difficult one found with more confidence."""
    corners = [[0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 300.0, 300.0]]
    labels = torch.tensor([1, 1])
    truth = dict(boxes=torch.tensor(corners), labels=labels, iscrowd=torch.tensor([0, 1]))
    guess = dict(boxes=torch.tensor([[0.0, 0.0, 100.0, 62.0], corners[1]]), labels=labels)
    guess.update(scores=torch.tensor([0.8, 0.9]))
    monkeypatch.setattr(detector, "losses_and_detections", lambda *_: (torch.ones(1), [guess]))
    found = detector.Detector.measure(task_of_one(), nn.Identity(), [([None], [truth])])
    assert found == pytest.approx(dict(loss=1.0, ap=30.0, ap50=100.0, voc07=100.0))


@torch.no_grad()
def test_what_is_measured_is_what_the_model_detects():
    model = create_ssd300("gld_resnet18", 5, pretrained_backbone=False).eval()
    images = [torch.rand(3, 72, 96), torch.rand(3, 120, 50)]
    targets = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))] * 2
    _, found = detector.losses_and_detections(model, images, targets)
    for ours, theirs in zip(found, model(images), strict=True):
        assert len(ours["boxes"])
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value)


def test_boxes_carry_their_own_classes_names():
    boxes = torch.tensor([[2.0, 2.0, 30.0, 30.0]] * 2)
    found = dict(boxes=boxes, labels=torch.tensor([1, 3]), scores=torch.tensor([0.9, 0.8]))

    def model(images):
        return [found]

    model.config = dict(label_names=["red", "green", "blue"])
    _, line = draw_boxes(model, torch.zeros(3, 40, 40, dtype=torch.uint8), 0.5)
    assert line == "red 90%, blue 80%"


def test_pixels_are_counted_at_the_masks_size():
    """Seven of eight are right: of all, whatever the classes; and enlarged by pixel centres."""
    ramp = torch.tensor([-1.0, 2.0, 2.0, 2.0])
    logits = torch.stack([0 * ramp, ramp])[None, :, None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])  # the last one is wrong
    options = dict(recipe=SimpleNamespace(num_classes=2))
    found = segmenter.Segmenter.measure(task_of_one(**options), nn.Identity(), [([logits], [mask])])
    assert found["accuracy"] == pytest.approx(100 * 7 / 8)
    assert found["miou"] == pytest.approx(100 * (2 / 3 + 5 / 6) / 2)


def test_ignored_pixels_are_not_in_the_mean():
    logits, mask = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    mask[:, 1:] = 255
    expected = F.cross_entropy(logits[:, :, :1], mask[:, :1])
    torch.testing.assert_close(segmenter.pixel_loss(logits, mask), expected)
