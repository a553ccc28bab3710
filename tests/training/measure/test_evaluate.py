"""Evaluation: numbers that can be worked out by hand, and the scores of a run's own log."""

import json

import pytest
import timm
import torch
from PIL import Image as PILImage

from gld_zoo.hub import save_pretrained
from gld_zoo.training.commands.evaluate import cli
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.data.batches import measuring_transform
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.evaluation import evaluate
from gld_zoo.training.measure.inputs import build_measured, measuring_batches, square_size
from gld_zoo.training.measure.scores import Scores
from gld_zoo.training.measure.tables import table, worst_classes
from helpers import SMALL_RUN, read_lines


def scores_of(probabilities, target):
    logits = torch.tensor(probabilities).log()[:, None]
    return Scores(logits, torch.tensor(target), 1.0)


def test_calibration_error_is_the_gap_of_each_bin_weighed_by_its_images():
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.52, 0.48]]
    scores = scores_of(probabilities, [0, 1, 1, 0])
    # confidences .9 .9 | .7 | .52; correct 1 0 | 1 | 1
    expected = 100 * (abs(1 - 1.8) + abs(1 - 0.7) + abs(1 - 0.52)) / 4
    assert scores.calibration_error() == pytest.approx(expected, rel=1e-5)
    assert scores_of([[1 - 1e-9, 1e-9]], [0]).calibration_error() == pytest.approx(0, abs=1e-5)
    # of fifteen bins .62 and .65 are in one, where the gaps cancel, and .69 in the next; of ten all
    # would be in one
    scores = scores_of([[0.62, 0.38], [0.65, 0.35], [0.69, 0.31]], [0, 1, 0])
    expected = 100 * (abs(1 - 0.62 - 0.65) + 1 - 0.69) / 3
    assert scores.calibration_error() == pytest.approx(expected, rel=1e-5)


def test_top_k_and_agreement():
    scores = scores_of([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], [1, 2])
    assert (scores.top(1), scores.top(2)) == (50.0, 100.0)
    assert scores.agreement(scores_of([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], [0, 0])) == 50.0


def test_a_runs_scores_are_those_of_its_log(
    student_run, teacher_run, tiny_dataset, tmp_path, capsys
):
    out = tmp_path / "out.json"
    arguments = ["--model", student_run, "--teacher", teacher_run, "--dataset", tiny_dataset]
    cli([str(argument) for argument in [*arguments, "--json", out]])
    result = json.loads(out.read_text())
    last = read_lines(student_run / "metrics.jsonl")[-1]
    assert result["top1"] == pytest.approx(last["test_top1"])
    assert result["top5"] == pytest.approx(last["test_top5"])
    summary = json.loads((student_run / "summary.json").read_text())
    assert result["teacher_top1"] == pytest.approx(summary["teacher"]["top1"])
    assert len(result["local_top1"]) == 4
    assert 0 <= result["agreement"] <= 100
    assert result["parameters"] == 180_916 - 96 * 65  # four classes instead of a hundred
    # stem, then by stage its first block, the others, and its shortcuts, at 32, 16 and 8 pixels
    assert (
        result["macs"]
        == 32**2 * (27 * 16 + 4 * 9 * 16**2)
        + sum(
            (32 // 2**i) ** 2 * (9 * w * w // 2 + 3 * 9 * w * w + w * w // 2)
            for i, w in ((1, 32), (2, 64))
        )
        + 64 * 4
    )
    printed = capsys.readouterr().out
    assert f"top1               {result['top1']:.2f} %" in printed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", ["--image_size", 64], "cannot take 64x64 images"),
        ("resnet18", ["--image_size", 16], None),
        pytest.param(
            "vit_tiny_patch16_224",
            [],
            "none: the head of VisionTransformer does not begin with average",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_timm_model_is_measured_with_local_rows_or_the_reason(
    tmp_path, tiny_dataset, capsys, name, options, message
):
    save_pretrained(timm.create_model(name, num_classes=4), tmp_path / "model")
    arguments = ["--model", f"local-dir:{tmp_path / 'model'}", "--dataset", str(tiny_dataset)]
    arguments += map(str, options)
    if message and message.startswith("none"):
        cli(arguments)
        assert f"local top1         {message}" in capsys.readouterr().out
    elif message:
        with pytest.raises(SystemExit) as stop:
            cli(arguments)
        assert message in str(stop.value.code)
    else:
        cli(arguments)
        assert "none: grid=2 needs a feature map" in capsys.readouterr().out


def test_images_are_prepared_as_the_cfg_says_or_it_is_refused():
    config = dict(input_size=(3, 24, 32), crop_pct=0.5, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ModelError, match="24x32, and only square ones"):
        square_size(config, None)
    assert square_size(config, 40) == 40
    wide = PILImage.linear_gradient("L").transpose(PILImage.Transpose.ROTATE_90)  # along x
    wide = wide.resize((60, 30)).convert("RGB")
    cases = [("random", "center"), *(("bicubic", mode) for mode in ("center", "squash", "border"))]
    for interpolation, mode in cases:
        asked = dict(config, interpolation=interpolation, crop_mode=mode)
        ours = measuring_transform(asked, 24)(wide)
        theirs = timm.data.create_transform(
            24,
            interpolation="bilinear" if interpolation == "random" else interpolation,
            mean=config["mean"],
            crop_pct=0.5,
            crop_mode=mode,
            normalize=False,
        )(wide)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("share", [-0.2, 1, 1.5])
def test_a_share_that_is_none_is_refused(student_run, tiny_dataset, share, capsys):
    options = ["--model", student_run, "--dataset", tiny_dataset, "--test_fraction", share]
    with pytest.raises(SystemExit, match=f"test_fraction={float(share)} must be at least 0"):
        cli([str(option) for option in options])


def test_an_unfinished_run_is_named(tmp_path, tiny_dataset):
    (tmp_path / "recipe.yaml").write_text("student: gld_resnet20\n")
    with pytest.raises(SystemExit) as stop:
        cli(["--model", str(tmp_path), "--dataset", str(tiny_dataset)])
    assert f"{tmp_path} holds no finished run" in str(stop.value.code)
    with pytest.raises(SystemExit) as stop:
        cli(["--model", f"local-dir:{tmp_path}/last", "--dataset", str(tiny_dataset)])
    assert "holds no model (config.json and model.safetensors); train it first" in str(
        stop.value.code
    )


def test_a_model_of_other_classes_is_refused(student_run, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["--model", str(student_run), "--dataset", "gld_zoo/data/cifar100_mini"])
    assert "has 4 classes and the dataset 100" in str(stop.value.code)


def test_a_teachers_mistakes_are_named_before_the_images_are_read(
    student_run, tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr("gld_zoo.training.measure.evaluation.collect", lambda *_: 1 / 0)
    save_pretrained(timm.create_model("mixer_s32_224", num_classes=4), tmp_path / "mixer")
    options = ["--model", str(student_run), "--dataset", str(tiny_dataset)]
    for teacher, words in [
        (f"local-dir:{tmp_path / 'mixer'}", "cannot take 32x32"),
        ("x", "teacher"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli([*options, "--teacher", teacher])
        assert words in str(stop.value.code)


def test_a_teacher_need_not_have_local_logits(student_run, tiny_dataset, tmp_path, capsys):
    save_pretrained(timm.create_model("efficientvit_b0", num_classes=4), tmp_path / "pooled")
    options = ["--model", str(student_run), "--dataset", str(tiny_dataset)]
    cli([*options, "--teacher", f"local-dir:{tmp_path / 'pooled'}"])
    assert "teacher top1" in capsys.readouterr().out


def test_numbers_are_shown_with_their_units_or_in_full():
    values = dict(train_top1=51.234, penalty=1e-5, images_per_second=1234567.8)
    shown = [line[18:].strip() for line in table(values).splitlines()]
    assert shown == ["51.23 %", "1e-05", "1234567.80"]


def test_agreement_is_of_the_global_rows():
    ours, theirs = torch.eye(2)[:, None].repeat(1, 3, 1), torch.eye(2)[:, None]
    ours[:, 1:] = ours[:, 1:].flip(2)  # whose cells say otherwise
    target = torch.tensor([0, 0])
    assert Scores(ours, target, 1.0).agreement(Scores(theirs, target, 1.0)) == 100.0


def test_local_top1_is_of_the_cells(tiny_dataset, tmp_path, monkeypatch):
    save_pretrained(timm.create_model("gld_wrn16_1", num_classes=4), tmp_path)
    logits = torch.eye(4)[[0, 0, 0, 0, 1]].expand(3, 5, 4)
    scores = Scores(logits, torch.ones(3, dtype=torch.int64), 1.0)
    monkeypatch.setattr("gld_zoo.training.measure.evaluation.collect", lambda *_, **options: scores)
    source = ImageSource(str(tiny_dataset))
    found = evaluate(f"local-dir:{tmp_path}", source, device=torch.device("cpu"))
    assert (found["top1"], found["local_top1"]) == (0.0, [0.0, 0.0, 0.0, 100.0])


def test_a_teacher_scores_as_it_does_alone(teacher_run, tiny_dataset, tmp_path):
    model = timm.create_model(f"local-dir:{teacher_run}/last", pretrained=True)
    save_pretrained(model, tmp_path, data_config=dict(mean=(0.9,) * 3, std=(0.1,) * 3))
    teacher, source = f"local-dir:{tmp_path}", ImageSource(str(tiny_dataset))
    options = dict(grid=0, device=torch.device("cpu"))
    alone = evaluate(teacher, source, **options)
    beside = evaluate(str(teacher_run), source, teacher=teacher, **options)
    assert beside["teacher_top1"] == alone["top1"] != beside["top1"]


def test_a_runs_teacher_is_shown_images_as_the_run_showed_them(
    teacher_run, tiny_dataset, tmp_path, distill
):
    teacher, out = f"local-dir:{teacher_run}/last", tmp_path / "out.json"
    run = ["--teacher", teacher, "--teacher_size", 20, "--run", tmp_path / "run"]
    distill(*SMALL_RUN, "--dataset", tiny_dataset, *run)
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["teacher"]["top1"]
    arguments = ["--model", str(tmp_path / "run"), "--teacher", teacher, "--json", str(out)]
    cli(arguments)
    found = json.loads(out.read_text())
    assert found["teacher_top1"] == pytest.approx(told)
    assert found["teacher_image_size"] == 20
    cli([*arguments, "--teacher_size", "own"])
    assert json.loads(out.read_text())["teacher_top1"] != pytest.approx(told)


def test_a_teacher_with_the_classes_in_another_order_is_matched_by_name(
    teacher_run, tiny_dataset, tmp_path
):
    teacher, out = timm.create_model(f"local-dir:{teacher_run}/last", pretrained=True), tmp_path
    names, order = teacher.pretrained_cfg["label_names"], [2, 0, 3, 1]
    with torch.no_grad():
        for part in (teacher.get_classifier().weight, teacher.get_classifier().bias):
            part.copy_(part[order])
    save_pretrained(teacher, out / "other", label_names=[names[place] for place in order])
    found = []
    for name in (f"{teacher_run}/last", f"{out}/other"):
        arguments = ["--model", str(teacher_run), "--teacher", name, "--json", f"{out}/out.json"]
        cli(arguments)
        found.append(json.loads((out / "out.json").read_text()))
    assert found[0]["agreement"] == found[1]["agreement"] == 100


@pytest.mark.parametrize("size", ["0", "-3"])
def test_a_size_that_is_none_is_refused(teacher_run, size, capsys):
    with pytest.raises(SystemExit):
        cli(["--model", str(teacher_run), "--teacher", "gld_wrn16_2", "--teacher_size", size])
    assert "teacher_size" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="teacher_size=64 is of a --teacher"):
        cli(["--model", str(teacher_run), "--teacher_size", "64"])


def test_classes_are_counted_and_those_without_images_left_out():
    probabilities = [[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    scores = scores_of(probabilities, [0, 1, 1, 1])
    assert scores.confusion().tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert scores.top1_by_class() == [100.0, pytest.approx(100 / 3), None]
    names = dict(zip(["ant", "bee", "cat"], scores.top1_by_class(), strict=True))
    assert worst_classes(names, 2) == "bee 33.3 %, ant 100.0 %"


def test_classes_confusion_and_mirror_images_of_a_run(student_run, tiny_dataset, tmp_path, capsys):
    arguments = ["--model", student_run, "--dataset", tiny_dataset, "--json", tmp_path / "out.json"]
    arguments += ["--picture", tmp_path / "confusion.png", "--mirror", "true"]
    cli([str(argument) for argument in arguments])
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["class_top1"]) == ["apple", "aquarium_fish", "baby", "bear"]
    with PILImage.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
    model = timm.create_model(f"local-dir:{student_run}/last", pretrained=True).eval()
    source = ImageSource(str(tiny_dataset))
    measured = build_measured(str(student_run), torch.device("cpu"))
    ((images, target),) = measuring_batches(source.test, measured, torch.device("cpu"))
    with torch.no_grad():
        guess = (model(images) + model(images.flip(3))).argmax(1)
    assert result["top1"] == pytest.approx(100 * (guess == target).double().mean().item())
    printed = capsys.readouterr().out
    assert "mirror             yes" in printed
    assert "worst 2 classes" in printed


def test_a_split_that_does_not_fit_in_memory_is_read_as_it_is_needed(
    student_run, tiny_dataset, monkeypatch
):
    source, device = ImageSource(str(tiny_dataset)), torch.device("cpu")
    whole = evaluate(str(student_run), source, device=device)
    monkeypatch.setattr("gld_zoo.training.data.loaders.MEMORY_LIMIT", 3 * 33 * 32**2 - 1)
    monkeypatch.setattr("gld_zoo.training.data.loaders.decode", None)
    parts = evaluate(str(student_run), source, device=device)
    assert parts["top1"] == whole["top1"]
