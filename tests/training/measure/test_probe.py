"""The linear probe: the optimum of its convex problem, and features that transfer."""

import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

from gld_zoo.training.build import fitted_head
from gld_zoo.training.build.fitted_head import fit_classifier, top1_of
from gld_zoo.training.commands.probe import cli
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure import probe as linear_probe
from gld_zoo.training.measure.probe import pooled_features


def problem(seed=0, rows=200, classes=3):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, 5, generator=generator)
    features = centres[target] + torch.randn(rows, 5, generator=generator)
    features[:, 4] = 7.0  # says nothing
    return features[:, None], target


def test_the_fit_is_the_optimum_whatever_the_scale_of_the_features():
    features, target = problem()
    classifier = fit_classifier(features, target, 3, penalty=1e-2)
    parameters = [classifier.weight.requires_grad_(), classifier.bias.requires_grad_()]
    loss = F.cross_entropy(classifier(features[:, 0]), target)
    loss = loss + 5e-3 * classifier.weight.square().sum()
    for gradient in torch.autograd.grad(loss, parameters):
        assert gradient.abs().max() < 1e-5
    scaled = fit_classifier(1000 * features - 3, target, 3, penalty=1e-2)
    torch.testing.assert_close(scaled.weight, classifier.weight, rtol=0, atol=1e-4)
    assert top1_of(scaled, 1000 * features - 3, target) == top1_of(classifier, features, target)


def test_a_larger_penalty_gives_smaller_weights_and_leaves_the_bias():
    features, target = problem()
    target[target == 2] = 1  # unequal classes
    small, large = (fit_classifier(features, target, 3, penalty=value) for value in (1e-4, 1e4))
    assert large.weight.norm() < 1e-3 < small.weight.norm()
    shares = target.bincount(minlength=3).double() / len(target)
    torch.testing.assert_close(large.bias[:2].softmax(0), shares[:2], rtol=0, atol=1e-3)


def test_views_of_an_image_count_as_images_of_its_class():
    features, target = problem()
    doubled = fit_classifier(torch.cat([features, features], dim=1), target, 3, penalty=1e-2)
    # the same images twice: the same optimum, but for the n - 1 of the standard deviation
    expected = fit_classifier(features, target, 3, penalty=1e-2)
    torch.testing.assert_close(doubled.weight, expected.weight, rtol=0, atol=5e-3)


def test_a_pretrained_backbone_beats_chance_on_other_images(tiny_dataset, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--model", "gld_wrn16_1", "--dataset", tiny_dataset, "--json", out]
    cli([str(option) for option in options])
    result = json.loads(out.read_text())
    assert (result["train_images"], result["test_images"], result["features"]) == (64, 33, 64)
    assert result["penalty"] in fitted_head.PENALTIES
    assert result["top1"] > 60  # four classes
    assert f"top1               {result['top1']:.2f} %" in capsys.readouterr().out


def test_a_model_without_weights_is_refused(tiny_dataset):
    with pytest.raises(SystemExit) as stop:
        cli(["--model", "gld_resnet44", "--dataset", str(tiny_dataset)])
    assert "model='gld_resnet44' cannot be created" in str(stop.value.code)


@pytest.mark.parametrize(
    ("best", "tried"), [(1e-3, [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]), (1.0, [1.0, 1e-1, 1e-2])]
)
def test_the_penalty_is_the_best_on_images_held_out_then_all_are_used(
    tiny_dataset, monkeypatch, best, tried
):
    fitted, scored = [], []

    def fit_classifier(features, target, classes, penalty, *, dtype=torch.float64, start=None):
        fitted.append((*features.shape[:2], penalty, dtype, start))
        return penalty

    def top1_of(penalty, features, target):
        scored.append(tuple(features.shape[:2]))
        return -abs(math.log(penalty / best))

    for module in (fitted_head, linear_probe):
        monkeypatch.setattr(module, "fit_classifier", fit_classifier)
        monkeypatch.setattr(module, "top1_of", top1_of)
    monkeypatch.setattr(fitted_head, "top1_of", lambda *each: 100 + top1_of(*each))
    source = ImageSource(str(tiny_dataset))
    result = linear_probe.linear_probe("gld_wrn16_1", source, device=torch.device("cpu"))
    held = scored[0][0]
    assert 0 < held < 32
    assert result["penalty"] == best
    assert scored == [(held, 1)] * len(tried) + [(64, 1), (33, 1)]
    starts = [None, *tried]  # each begins at the one before it
    assert fitted == [
        *(
            (64 - held, 2, value, torch.float32, start)
            for value, start in zip(tried, starts[:-1], strict=True)
        ),
        (64, 2, best, torch.float64, None),
    ]


def test_a_start_changes_how_soon_the_optimum_is_found_and_not_the_optimum():
    features, target = problem()
    start = fit_classifier(features, target, 3, penalty=1.0)
    fits = [fit_classifier(features, target, 3, penalty=1e-2, start=each) for each in (None, start)]
    torch.testing.assert_close(fits[0].weight, fits[1].weight, rtol=0, atol=1e-4)


def test_a_fitted_classifier_takes_rows_of_any_shape_and_keeps_what_it_needs():
    features, target = problem()
    head = fit_classifier(features, target, 3, penalty=1e-2)
    rows = features[:6, 0]
    standardised = (rows.double() - features[:, 0].double().mean(0)) / head.std
    expected = standardised @ head.weight.T + head.bias
    torch.testing.assert_close(head(rows.reshape(2, 3, 5)).flatten(0, 1), expected)
    torch.testing.assert_close(head.float()(rows), expected.float(), rtol=1e-5, atol=1e-5)
    assert head(rows.double()).dtype == torch.float32
    assert set(head.state_dict()) == {"mean", "std", "weight", "bias"}


def test_the_second_view_is_the_mirror_image():
    model, target = timm.create_model("gld_wrn16_1").eval(), torch.zeros(2)
    images = torch.randn(2, 3, 32, 32)
    views, _ = pooled_features(model, [(images, target)], mirrored=True)
    turned = torch.from_numpy(images.numpy()[..., ::-1].copy())
    alone, _ = pooled_features(model, [(turned, target)], mirrored=False)
    torch.testing.assert_close(views[:, 1:], alone)


def test_features_that_do_not_fit_are_refused_before_they_are_computed(
    student_run, tiny_dataset, monkeypatch
):
    monkeypatch.setattr(
        fitted_head.psutil,
        "virtual_memory",
        lambda: SimpleNamespace(available=64 * 2 * 64 * 24 - 1),
    )
    monkeypatch.setattr(linear_probe, "pooled_features", None)
    with pytest.raises(DataError, match=r"features of 64 images take .* or --mirror false"):
        linear_probe.linear_probe(
            str(student_run), ImageSource(str(tiny_dataset)), device=torch.device("cpu")
        )
