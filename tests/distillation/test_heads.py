"""Local logits of any timm CNN, and a clear error where they are undefined."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

from gld_zoo import GlobalLocal, global_local_logits
from gld_zoo.distillation.maps import FeatureMap, count_cells

CNNS = ["resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_100", "regnetx_002"]


def randomise(model):
    """Give all values something that tells: heads start near zero, norms at the identity."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            torch.nn.init.normal_(value, std=0.05) if value.ndim > 1 else torch.nn.init.uniform_(
                value, 0.5, 1.5
            )
    return model.eval()


@pytest.mark.parametrize("name", [*CNNS, "gld_resnet18", "gld_resnet20", "gld_wrn16_1"])
@torch.no_grad()
def test_row_0_is_the_model_and_each_cell_goes_through_its_head(name):
    model = randomise(timm.create_model(name, num_classes=7))
    images = torch.randn(2, 3, 64, 64)
    logits = global_local_logits(model, images, grid=2)
    assert logits.shape == (2, 5, 7)
    torch.testing.assert_close(
        logits[:, 0], model(images), rtol=1e-4, atol=1e-4 * logits.abs().max().item()
    )
    features = model.forward_features(images)
    cells = F.adaptive_avg_pool2d(features, 2)
    for i in range(4):
        row, column = divmod(i, 2)
        expected = model.forward_head(cells[:, :, row : row + 1, column : column + 1])
        torch.testing.assert_close(
            logits[:, 1 + i], expected, rtol=1e-4, atol=1e-4 * logits.abs().max().item()
        )


@torch.no_grad()
def test_cells_tile_the_map_row_by_row_and_average_to_the_global_logit():
    model = randomise(timm.create_model("gld_resnet20"))
    images = torch.randn(3, 3, 32, 32)
    features = model.forward_features(images)
    logits = model.forward_logits(images, grid=4)
    assert logits.shape == (3, 17, 100)
    second = features[:, :, :2, 2:4].mean((2, 3))  # first row, second cell of an 8 x 8 map
    torch.testing.assert_close(logits[:, 2], model.fc(second), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 1:].mean(1), logits[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_grid_that_does_not_divide_the_map_pools_adaptively():
    model = randomise(timm.create_model("gld_resnet18", num_classes=7))
    images = torch.randn(1, 3, 224, 224)
    logits = model.forward_logits(images, grid=2)
    first = model.forward_features(images)[:, :, :4, :4].mean(
        (2, 3)
    )  # rows and columns 0 to 3 of 7
    torch.testing.assert_close(logits[:, 1], model.fc(first), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "grid"), [(7, 7, 2), (7, 5, 3), (8, 7, 4), (7, 7, 7)])
def test_cells_are_those_of_torchs_adaptive_pooling(height, width, grid):
    model = timm.create_model("gld_resnet20", num_classes=3).double().eval()
    features = torch.randn(2, 64, height, width, dtype=torch.float64, requires_grad=True)
    pooled = torch.nn.functional.adaptive_avg_pool2d(features, grid).flatten(2).mT
    expected = torch.cat([features.mean((2, 3))[:, None], pooled], 1)
    ours = model.fc(FeatureMap(features, "NCHW").rows(grid))
    torch.testing.assert_close(ours, model.fc(expected), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = [
        torch.autograd.grad((weights * rows).sum(), features, retain_graph=True)[0]
        for rows in (ours, model.fc(expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_wrapper_equals_the_function_and_owns_no_parameter():
    model = timm.create_model("gld_wrn16_1").eval()
    wrapped = GlobalLocal(model, grid=2)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(wrapped(images), global_local_logits(model, images, 2))
    assert {name.removeprefix("model.") for name in wrapped.state_dict()} == set(model.state_dict())


def test_gradient_reaches_every_parameter_and_training_mode_is_kept():
    model = timm.create_model("gld_wrn16_1")
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    model.forward_logits(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_head_runs_in_float32_under_autocast():
    model = timm.create_model("gld_resnet20").eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.forward_logits(torch.randn(2, 3, 32, 32))
    assert logits.dtype == torch.float32


def test_compiles_without_a_graph_break():
    wrapped = GlobalLocal(timm.create_model("gld_resnet20").eval())
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), wrapped(images))


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("vit_tiny_patch16_224", {}, 224, "classifies its class token.*teacher_head: fit"),
        ("deit_tiny_distilled_patch16_224", {}, 224, "classifies its class token"),
        pytest.param(
            *("vit_base_patch16_siglip_224", dict(num_classes=3), 224, "average pooling"),
            marks=pytest.mark.slow,
        ),
        ("crossvit_tiny_240", {}, 240, "gives list.*need a map"),
        ("pit_ti_distilled_224", {}, 224, "not those of a map line by line"),
        ("gld_resnet20", dict(num_classes=0), 32, "no classifier"),
        ("resnet18", dict(num_classes=0), 64, "no classifier"),
        ("resnet18", dict(features_only=True), 64, "features_only"),
        (
            "gld_resnet18",
            {},
            32,
            "grid=2 needs a feature map of at least 2x2, got 1x1 for a 32x32 input",
        ),
        ("resnet18", dict(global_pool="max"), 64, "does not begin with average pooling"),
        ("resnet18", dict(global_pool="catavgmax"), 64, "does not begin with average pooling"),
        pytest.param(
            "vgg11", {}, 64, "does not begin with average pooling", marks=pytest.mark.slow
        ),
        ("efficientvit_b0", {}, 64, "does not begin with average pooling"),
    ],
)
def test_models_without_local_logits_are_refused_with_the_reason(name, options, size, message):
    model = timm.create_model(name, **options)
    with pytest.raises(ValueError, match=message):
        global_local_logits(model, torch.randn(2, 3, size, size))


def test_a_head_seen_on_a_1x1_map_is_still_checked():
    model = timm.create_model("resnet18", global_pool="max", num_classes=5)
    with pytest.raises(ValueError, match="average pooling"):
        global_local_logits(model, torch.randn(2, 3, 32, 32), grid=1)


def test_a_head_of_zeros_is_checked_again_when_it_has_learnt():
    model = timm.create_model("resnet18", global_pool="max", num_classes=5)
    torch.nn.init.zeros_(model.fc.weight)
    images = torch.randn(2, 3, 64, 64)
    global_local_logits(model, images)
    torch.nn.init.normal_(model.fc.weight)
    with pytest.raises(ValueError, match="average pooling"):
        global_local_logits(model, images)


def test_models_with_two_classifiers_are_taken():
    model = timm.create_model("efficientformerv2_s0", num_classes=5).eval()
    images = torch.randn(1, 3, 224, 224)
    for _ in range(2):
        torch.testing.assert_close(global_local_logits(model, images)[:, 0], model(images))


@pytest.mark.slow
def test_compiled_wrapper_refuses_a_grid_finer_than_the_map():
    compiled = torch.compile(
        GlobalLocal(timm.create_model("gld_resnet20"), grid=9), backend="eager"
    )
    with pytest.raises(Exception, match="grid=9 needs a feature map"):
        compiled(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_keep_theirs(dtype):
    model = timm.create_model("gld_resnet20", dtype=dtype).eval()
    logits = model.forward_logits(torch.randn(2, 3, 32, 32, dtype=dtype))
    assert logits.dtype == dtype


@pytest.mark.parametrize("grid", [0, -1, 9])
def test_grid_out_of_range_is_named(grid):
    model = timm.create_model("gld_resnet20")
    with pytest.raises(ValueError, match=f"grid={grid}.*from 1 to 8"):
        model.forward_logits(torch.randn(1, 3, 32, 32), grid)


def test_pruned_model_is_refused_and_a_reset_head_is_checked_again():
    model = timm.create_model("gld_resnet20")
    images = torch.randn(2, 3, 32, 32)
    model.forward_logits(images)
    model.reset_classifier(10, "max")
    with pytest.raises(ValueError, match="average pooling"):
        model.forward_logits(images)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="no classifier"):
        model.forward_logits(images)


def test_a_head_with_another_pooling_is_refused_before_it_can_be_compiled():
    model = timm.create_model("resnet18", num_classes=5, global_pool="max")
    with pytest.raises(ValueError, match="does not begin with average pooling"):
        GlobalLocal(model)


def test_what_is_no_timm_classifier_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="Identity has no forward_features"):
        GlobalLocal(torch.nn.Identity())
    with pytest.raises(ValueError, match="SqueezeNet has no forward_features"):
        GlobalLocal(torchvision.models.squeezenet1_0(num_classes=3))


def test_checking_a_head_leaves_the_random_state_alone():
    model = timm.create_model("gld_resnet20")
    before = torch.random.get_rng_state()
    GlobalLocal(model.eval())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("grids", [(2, 4), (4, 2), (2, 3, 8), [3], [2, 4]])
@torch.no_grad()
def test_rows_of_several_grids_follow_each_other_in_the_order_given(grids):
    model = randomise(timm.create_model("gld_resnet20", num_classes=7))
    images = torch.randn(2, 3, 32, 32)
    logits = global_local_logits(model, images, grids)
    single = [global_local_logits(model, images, grid) for grid in grids]
    expected = torch.cat([single[0][:, :1], *(rows[:, 1:] for rows in single)], 1)
    assert logits.shape == (2, 1 + count_cells(grids), 7)
    # float32 matrix products of another size
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_wrapper_and_model_take_several_grids_and_compile():
    model = timm.create_model("gld_resnet20").eval()
    images = torch.randn(2, 3, 32, 32)
    expected = global_local_logits(model, images, (2, 4))
    wrapped = GlobalLocal(model, grid=(2, 4))
    assert torch.equal(wrapped(images), expected)
    assert torch.equal(model.forward_logits(images, grid=(2, 4)), expected)
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("grids", [(2, 2), (1, 2), (0, 2), (), []])
def test_grids_that_there_cannot_be_are_named(grids):
    model = timm.create_model("gld_resnet20").eval()
    images = torch.randn(1, 3, 32, 32)
    message = re.escape(f"grid={grids} must be a whole number, or different ones above 1")
    for logits in (model.forward_logits, lambda images, grid: GlobalLocal(model, grid)(images)):
        with pytest.raises(ValueError, match=message):
            logits(images, grids)


def test_the_finest_of_several_grids_must_fit_the_map():
    model = timm.create_model("gld_resnet20")
    message = re.escape("grid=(9, 2) needs a feature map of at least 9x9, got 8x8")
    with pytest.raises(ValueError, match=message):
        model.forward_logits(torch.randn(1, 3, 32, 32), (9, 2))
