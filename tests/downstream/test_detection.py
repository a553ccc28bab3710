"""SSD300: torchvision's interface, the map sizes, the exported part, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.image_list import ImageList

import gld_zoo
from gld_zoo.downstream.detection import MAPS, DenseSSD, create_ssd300
from gld_zoo.downstream.saving import load_downstream, save_downstream
from gld_zoo.hub import save_pretrained
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.data.batches import Share
from gld_zoo.training.tasks.detector import Detector


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_ssd300("gld_resnet18", num_classes=5, pretrained_backbone=False).eval()


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def test_parameters_with_21_classes():
    """The paper's 21.57M and 31.68M have extra layers that it does not give."""
    assert parameters(gld_zoo.create_ssd300(pretrained_backbone=False)) == 15_481_646
    assert parameters(create_ssd300("gld_resnet34", pretrained_backbone=False)) == 25_589_806


@pytest.mark.parametrize("backbone", ["gld_resnet18", "mobilenetv3_small_050"])
@torch.no_grad()
def test_maps_are_ssd300s(backbone):
    model = create_ssd300(backbone, 3, pretrained_backbone=False).eval()
    maps = model.backbone(torch.zeros(1, 3, 300, 300)).values()
    assert tuple(one.shape[-1] for one in maps) == MAPS
    offsets, logits = DenseSSD(model)(torch.zeros(1, 3, 300, 300))
    assert offsets.shape == (1, 8732, 4)
    assert logits.shape == (1, 8732, 3)


@pytest.mark.slow
def test_default_boxes_are_those_of_torchvisions_ssd300(model):
    theirs = ssd300_vgg16(weights=None, weights_backbone=None).anchor_generator
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    maps = [torch.zeros(1, 1, side, side) for side in MAPS]
    for ours, expected in zip(
        model.anchor_generator(images, maps), theirs(images, maps), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_losses_in_training_detections_in_evaluation(model):
    images = [torch.rand(3, 200, 320), torch.rand(3, 90, 60)]
    targets = [
        dict(boxes=torch.tensor([[20.0, 30.0, 180.0, 190.0]]), labels=torch.tensor([2])),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
    ]
    losses = model.train()(images, targets)
    assert losses.keys() == {"bbox_regression", "classification"}
    sum(losses.values()).backward()
    assert model.backbone.body.conv1.weight.grad.abs().sum() > 0
    model.zero_grad()
    found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        assert one.keys() == {"boxes", "labels", "scores"}
        height, width = image.shape[1:]
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert (one["scores"] >= 0.01).all()


def test_an_image_without_boxes_alone_costs_nothing_but_is_finite(model):
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = model.train()([torch.rand(3, 100, 100)], [target])
    model.eval()
    assert all(loss.item() == 0 for loss in losses.values())


@torch.no_grad()
def test_the_dense_part_decoded_is_the_model(model):
    dense = DenseSSD(model).eval()
    images = torch.rand(2, 3, 300, 300)
    sizes = [(300, 300), (300, 300)]
    for expected, got in zip(model(list(images)), dense.decode(*dense(images), sizes), strict=True):
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)
    twice = dense.decode(*dense(images), [(600, 300), (300, 300)])
    assert twice[0]["boxes"][:, 3].max() > 300


@torch.no_grad()
def test_the_dense_part_exports(model):
    dense = DenseSSD(model).eval()
    images = torch.rand(2, 3, 300, 300)
    batch = torch.export.Dim("batch")
    program = torch.export.export(dense, (images,), dynamic_shapes=({0: batch},))
    for got, expected in zip(program.module()(images[:1]), dense(images[:1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_dense_part_in_onnxruntime_decoded_is_the_model(model, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    dense = DenseSSD(model).eval()
    path = tmp_path / "ssd.onnx"
    images = torch.rand(2, 3, 300, 300)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        dense, (images,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [torch.from_numpy(one) for one in session.run(None, {name: images.numpy()})]
    for got, expected in zip(outputs, dense(images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_saved_model_comes_back(model, tmp_path):
    folder = save_downstream(model, tmp_path / "ssd", label_names=list("abcd"))
    loaded = load_downstream(folder)
    assert loaded.config["label_names"] == list("abcd")
    image = torch.rand(3, 120, 150)
    for key, value in model([image])[0].items():
        assert torch.equal(loaded([image])[0][key], value)


@pytest.mark.parametrize("tag", ["miil_in21k", "ra_in1k"])
def test_a_saved_model_normalises_as_before(tmp_path, tag):
    model = create_ssd300(f"mobilenetv3_large_100.{tag}", 3, pretrained_backbone=False)
    loaded = load_downstream(save_downstream(model, tmp_path, label_names=["a", "b"]))
    for name in ("image_mean", "image_std"):
        assert getattr(loaded.transform, name) == getattr(model.transform, name)
    assert (model.transform.image_mean == [0, 0, 0]) == (tag == "miil_in21k")


def test_a_backbone_of_its_own_arguments_comes_back(tmp_path):
    body = timm.create_model("gld_resnet18", stem_width=32, stem_type="deep", num_classes=3)
    save_pretrained(body, tmp_path / "body")
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    config["model_args"] = dict(stem_width=32, stem_type="deep")
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    model = create_ssd300(f"local-dir:{tmp_path / 'body'}", 3)
    assert torch.equal(model.backbone.body.conv1[0].weight, body.conv1[0].weight)
    loaded = load_downstream(save_downstream(model, tmp_path / "ssd", label_names=["a", "b"]))
    assert loaded.backbone.body.conv1[0].weight.shape == body.conv1[0].weight.shape


def test_names_that_are_not_one_a_class_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="5 label_names for a model of 4 classes"):
        save_downstream(model, tmp_path / "ssd", label_names=list("abcde"))
    assert not (tmp_path / "ssd").exists()


def test_what_is_not_whole_is_refused(model, tmp_path):
    folder = save_downstream(model, tmp_path / "ssd", label_names=list("abcd"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="holds no whole detector or segmenter"):
        load_downstream(folder)
    with pytest.raises(ValueError, match=r"FileNotFoundError.*config\.json"):
        load_downstream(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(backbone="gld_wrn16_1"), r"maps at strides \[1, 2, 4\], not at \[8, 16, 32\]"),
        (dict(backbone="gld_resnet19"), "Unknown model"),
        (dict(backbone="gld_resnet34"), "pass pretrained_backbone=False for random weights"),
        (dict(num_classes=1), "num_classes=1 leaves no class"),
        (dict(backbone="vgg11", pretrained_backbone=False), "gives maps of side"),
        (
            dict(backbone="efficientformerv2_s0", pretrained_backbone=False),
            "cannot take 300 x 300 images",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_ssd300(**options)


def test_thresholds_are_ssds(model):
    assert (model.nms_thresh, model.score_thresh, model.detections_per_img) == (0.45, 0.01, 200)
    assert (model.proposal_matcher.high_threshold, model.neg_to_pos_ratio) == (0.5, 3)


def test_a_batch_of_one_that_batch_norm_cannot_take_is_refused(model):
    """Attention over channels has batch norm on pooled maps."""
    attentive = create_ssd300("skresnet18", 3, pretrained_backbone=False)
    recipe = SimpleNamespace(backbone="skresnet18", batch_size=2, sync_batch_norm=False)
    cpu = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(recipe=recipe, accelerator=cpu)
    Detector._check_batch(trainer, attentive, Share())
    message = "batch_size=2 leaves a process one image, on which backbone 'skresnet18' cannot train"
    with pytest.raises(ModelError, match=message):
        Detector._check_batch(trainer, attentive, Share(0, 2))
    Detector._check_batch(trainer, model.train(), Share(0, 2))
    model.eval()
