"""Everyone else's libraries, each run for real; one that is not installed is skipped by name."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import gld_zoo  # noqa: F401  registers the models
from gld_zoo.hub import save_pretrained
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.evaluation import evaluate
from helpers import BUNDLED

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with class names, as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    model = timm.create_model("gld_wrn16_1", num_classes=len(NAMES)).eval()
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(model, folder, label_names=NAMES)
    return model, folder


DOCUMENT = (Path(__file__).parent.parent / "docs" / "interoperation.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"`(smp\.[^`]+)`", DOCUMENT))
@torch.no_grad()
def test_segmentation_models_pytorch_as_the_document_has_it(code):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = eval(code, dict(smp=smp)).eval()
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 1, 64, 96)


@pytest.mark.parametrize("decoder", ["DeepLabV3Plus", "Unet"])
@torch.no_grad()
def test_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    build = getattr(smp, decoder)
    model = build("tu-gld_resnet18", encoder_weights=None, classes=3).eval()
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3, 64, 96)


@torch.no_grad()
def test_segmentation_models_pytorch_on_a_32_x_32_network():
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = dict(encoder_depth=2, decoder_channels=(64, 32), encoder_weights=None)
    model = smp.Unet("tu-gld_resnet20", classes=3, **options).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)


class Pyramid(nn.Module):
    """timm's features as torchvision's detectors take a backbone."""

    out_channels = 64

    def __init__(self, name):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images):
        maps = OrderedDict((str(i), one) for i, one in enumerate(self.body(images)))
        return self.pyramid(maps)


def test_torchvision_faster_rcnn():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = ((32,), (64,), (128,))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)
    backbone = Pyramid("gld_resnet18")
    model = FasterRCNN(
        backbone, num_classes=5, min_size=96, max_size=128, rpn_anchor_generator=anchors
    )
    target = dict(boxes=torch.tensor([[8.0, 8.0, 60.0, 70.0]]), labels=torch.tensor([2]))
    losses = model([torch.rand(3, 96, 96)], [target])
    sum(losses.values()).backward()
    assert backbone.body.conv1.weight.grad.abs().sum() > 0
    assert {"boxes", "labels", "scores"} == model.eval()([torch.rand(3, 96, 96)])[0].keys()


def test_torchvision_ssd():
    from torchvision.models.detection.ssd import SSD, DefaultBoxGenerator

    boxes = DefaultBoxGenerator([[2, 3]] * 3)
    backbone = Pyramid("gld_resnet18")
    backbone.out_channels = [backbone.out_channels] * 3  # SSD asks for each map's
    model = SSD(backbone, boxes, (96, 96), num_classes=5)
    target = dict(boxes=torch.tensor([[8.0, 8.0, 60.0, 70.0]]), labels=torch.tensor([2]))
    losses = model([torch.rand(3, 96, 96)], [target])
    assert all(loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_transformers_loads_what_is_saved(saved):
    transformers = pytest.importorskip("transformers")
    model, folder = saved
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, model(images))
    assert loaded.config.id2label == dict(enumerate(NAMES))


@torch.no_grad()
def test_transformers_pipeline_shows_the_class_names(saved):
    transformers = pytest.importorskip("transformers")
    model, folder = saved
    image = Image.linear_gradient("L").convert("RGB")
    found = transformers.pipeline("image-classification", model=str(folder))(image)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    p, indices = model(transform(image)[None]).softmax(1)[0].topk(4)
    assert [line["label"] for line in found] == [NAMES[i] for i in indices]
    for line, value in zip(found, p.tolist(), strict=True):
        assert line["score"] == pytest.approx(value, abs=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_timm_validates_through_its_own_datasets_and_loader():
    model = timm.create_model("gld_wrn16_1", pretrained=True).eval()
    columns = dict(input_key="img", target_key="fine_label")
    dataset = timm.data.create_dataset(f"hfds/{BUNDLED}", root=None, split="test", **columns)
    config = timm.data.resolve_model_data_config(model)
    loader = timm.data.create_loader(
        dataset,
        batch_size=250,
        use_prefetcher=False,
        num_workers=0,
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    )
    hits = sum((model(images).argmax(1) == target).sum().item() for images, target in loader)
    ours = evaluate("gld_wrn16_1", ImageSource(str(BUNDLED)), grid=0, device=torch.device("cpu"))
    assert 100 * hits / len(dataset) == pytest.approx(ours["top1"], abs=0.1)


@pytest.mark.parametrize("name", ["gld_resnet20", "gld_wrn16_1", "gld_resnet18"])
@torch.no_grad()
def test_torchvision_extracts_features(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = timm.create_model(name).eval()
    images = torch.randn(2, *model.default_cfg["input_size"])
    info = model.feature_info[-1]
    extractor = create_feature_extractor(model, {info["module"]: "map"})
    found = extractor(images)["map"]
    assert found.shape[1] == info["num_chs"]
    assert found.shape[-1] == images.shape[-1] // info["reduction"]
    expected = model.forward_intermediates(images, indices=1, intermediates_only=True, norm=False)
    torch.testing.assert_close(found, expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gld_resnet20", "gld_wrn16_1", "gld_resnet18"])
@torch.no_grad()
def test_onnx_of_any_batch_gives_the_same_logits(tmp_path, name):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    size = 32 if name != "gld_resnet18" else 64
    model = timm.create_model(name, pretrained=name == "gld_wrn16_1").eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, size, size),),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, size, size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
