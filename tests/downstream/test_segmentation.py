"""DeepLabV3+: the paper's parameter counts, any size of image, export, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

import gld_zoo
from gld_zoo.downstream.saving import load_downstream, save_downstream
from gld_zoo.downstream.segmentation import _resize, create_deeplabv3plus
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.segmentation_rows import SegmentationRows
from gld_zoo.training.tasks.segmenter import Segmenter


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_deeplabv3plus("gld_resnet18", 5, pretrained_backbone=False).eval()


@pytest.mark.parametrize(
    ("backbone", "count"), [("gld_resnet18", 16_608_181), ("gld_resnet34", 26_716_341)]
)
def test_parameters_are_the_papers(backbone, count):
    model = gld_zoo.create_deeplabv3plus(backbone, 21, pretrained_backbone=False)
    assert sum(weight.numel() for weight in model.parameters()) == count


@pytest.mark.parametrize("size", [(513, 513), (512, 512), (97, 131), (33, 64)])
@torch.no_grad()
def test_logits_are_of_the_images_size(model, size):
    assert model(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize(("output_stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
@torch.no_grad()
def test_output_stride_and_rates(output_stride, rates):
    model = create_deeplabv3plus("gld_resnet18", 3, output_stride, pretrained_backbone=False)
    low, deep = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    assert (low.shape[-1], deep.shape[-1]) == (16, 64 // output_stride)
    found = [layer.dilation[0] for layer in model.aspp.modules() if hasattr(layer, "dilation")]
    assert tuple(rate for rate in found if rate > 1) == rates


def test_logits_are_enlarged_by_their_pixels_centres():
    """As torch does by default; with aligned corners a network would differ between sizes."""
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    enlarged = _resize(ramp, torch.zeros(1, 1, 8, 8))
    assert enlarged[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_every_part_learns(model):
    model.train()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    model.eval()
    still = [name for name, weight in model.named_parameters() if not weight.grad.abs().sum()]
    model.zero_grad()
    assert still == []


@torch.no_grad()
def test_export_of_any_batch(model):
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.rand(2, 3, 65, 97),), dynamic_shapes=({0: batch},))
    images = torch.rand(3, 3, 65, 97)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_any_batch(model, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "deeplab.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (torch.rand(2, 3, 65, 97),),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 65, 97)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_saved_model_comes_back(model, tmp_path):
    loaded = load_downstream(save_downstream(model, tmp_path, label_names=list("abcde")))
    images = torch.rand(1, 3, 70, 50)
    assert torch.equal(loaded(images), model(images))
    assert loaded.config["label_names"] == list("abcde")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_stride=32), "output_stride=32 is not 16 or 8"),
        (dict(num_classes=0), "num_classes=0 must be at least 1"),
        (dict(backbone="gld_resnet20"), r"maps at strides \[1, 2, 4\], not at \[32\]"),
        (
            dict(backbone="densenet121", pretrained_backbone=False),
            "does not take output_stride=16",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_deeplabv3plus(**options)


@pytest.mark.parametrize(("value", "found"), [(0, "the value 0 alone"), (255, "no value")])
def test_masks_of_one_class_are_never_measured(value, found):
    """Of a large split not all masks are looked at before; any model would score 100 %."""
    rows = SegmentationRows(
        table=None, image_column="image", where="split 'test'", mask_column="mask", classes=2
    )
    trainer = SimpleNamespace(
        share_buffers=lambda model: None,
        accelerator=SimpleNamespace(num_processes=1, device=torch.device("cpu")),
        recipe=SimpleNamespace(num_classes=2),
        source=SimpleNamespace(test=rows),
    )
    logits, mask = torch.randn(1, 2, 4, 4), torch.full((4, 4), 255)
    mask[0] = value
    with pytest.raises(DataError, match=f"masks of split 'test' hold {found} beside 255"):
        Segmenter.measure(trainer, torch.nn.Identity(), [([logits], [mask])])
