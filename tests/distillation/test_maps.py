"""Features of any timm model: the map its head takes, over the whole and cell by cell."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from gld_zoo import GlobalLocal, global_local_features, global_local_logits
from gld_zoo.distillation import maps

# name, options, side of the images, whether the head begins with average pooling
SMALL = [
    ("resnet18", {}, 64, True),
    ("mobilenetv3_small_100", {}, 64, True),
    ("vit_tiny_patch16_224", dict(img_size=64), 64, False),
    ("vit_tiny_patch16_224", dict(img_size=64, global_pool="avg"), 64, True),
    ("mambaout_femto", {}, 64, True),
    ("vit_small_patch14_dinov2", dict(dynamic_img_size=True, depth=2), 98, False),
    ("hiera_tiny_224", {}, 224, True),
]
ALL = [
    ("convnext_atto", {}, 64, True),
    ("efficientnet_b0", {}, 64, True),
    ("swin_tiny_patch4_window7_224", {}, 224, True),
    ("deit3_small_patch16_224", {}, 224, False),
    ("eva02_tiny_patch14_224", {}, 224, True),
    ("beit_base_patch16_224", dict(depth=2), 224, True),
    ("maxvit_tiny_tf_224", {}, 224, True),
    ("mobilevit_s", {}, 64, True),
    ("repvit_m1", {}, 64, True),
    ("fastvit_t8", {}, 64, True),
    ("coat_lite_tiny", {}, 224, False),
    ("twins_svt_small", {}, 224, True),
]


def create(name, options):
    """Return a model of seven classes whose classifier tells: some begin at zero."""
    model = timm.create_model(name, num_classes=7, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 7:
            nn.init.normal_(module.weight, std=0.1)
    return model


def positions(model, features):
    """Return a map `[B, H, W, D]` of what `forward_features` gave, by loops and slices alone."""
    if features.ndim == 4:
        return features.movedim(1, 3) if features.shape[1] == model.num_features else features
    side = int(features.shape[1] ** 0.5)
    places = features[:, features.shape[1] - side * side :]
    return torch.stack([places[:, i * side : (i + 1) * side] for i in range(side)], dim=1)


@pytest.mark.parametrize(
    ("name", "options", "size", "has_logits"),
    [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
@torch.no_grad()
def test_rows_are_the_means_of_the_map_and_of_its_cells(name, options, size, has_logits):
    model = create(name, options)
    images = torch.randn(2, 3, size, size)
    rows = global_local_features(model, images, grid=2)
    places = positions(model, model.forward_features(images))
    assert rows.shape == (2, 5, model.num_features)
    expected = [places.flatten(1, 2).mean(1)]
    side = places.shape[1]
    halves = [(0, -(-side // 2)), (side // 2, side)]
    expected += [
        places[:, top:bottom, left:right].flatten(1, 2).mean(1)
        for top, bottom in halves
        for left, right in halves
    ]
    scale = places.abs().max().item()
    # float32 sums in another order
    torch.testing.assert_close(rows, torch.stack(expected, 1), rtol=1e-5, atol=1e-5 * scale)
    if not has_logits:
        with pytest.raises(ValueError, match=r"class token.*teacher_head: fit"):
            global_local_logits(model, images)
        return
    logits, whole = global_local_logits(model, images), model(images)
    assert logits.shape == (2, 5, 7)
    torch.testing.assert_close(logits[:, 0], whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@torch.no_grad()
def test_cells_of_a_transformer_stand_where_the_images_parts_do():
    """A patch that is changed moves the tokens of its own cell most, without attention alone."""
    model = create("vit_tiny_patch16_224", dict(img_size=64, global_pool="avg"))
    for block in model.blocks:
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    images = torch.randn(1, 3, 64, 64)
    before = global_local_features(model, images)
    for cell, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        changed = images.clone()
        changed[:, :, top : top + 32, left : left + 32] += 1
        moved = (global_local_features(model, changed) - before).abs().amax(2)[0, 1:]
        assert moved[cell] > 0.01
        assert moved.sum() == moved[cell]


def test_features_need_no_classifier_and_carry_a_gradient():
    model = timm.create_model("gld_resnet20", num_classes=0)
    rows = global_local_features(model, torch.randn(2, 3, 32, 32), grid=(2, 4))
    assert rows.shape == (2, 21, 64)
    rows.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_features_under_autocast_are_averaged_in_float32():
    model = create("vit_tiny_patch16_224", dict(img_size=64))
    with torch.autocast("cpu", torch.bfloat16):
        rows = global_local_features(model, torch.randn(2, 3, 64, 64))
    assert rows.dtype == torch.float32


@torch.no_grad()
def test_a_map_that_is_not_square_is_folded_by_the_aspect_of_the_images():
    model = create("vit_tiny_patch16_224", dict(img_size=(64, 96)))
    images = torch.randn(1, 3, 64, 96)
    tokens = model.forward_features(images)[:, 1:].reshape(1, 4, 6, -1)
    rows = global_local_features(model, images)
    torch.testing.assert_close(rows[:, 2], tokens[:, :2, 3:].mean((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tokens_are_compiled_without_a_graph_break():
    model = create("vit_tiny_patch16_224", dict(img_size=64, global_pool="avg"))
    wrapped, images = GlobalLocal(model), torch.randn(2, 3, 64, 64)
    expected = wrapped(images)
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)


def test_tokens_in_an_order_that_nothing_tells_are_refused():
    class Shuffled(nn.Module):
        num_features, num_classes = 8, 3

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 16, 16)

        def forward_features(self, images):
            return self.embed(images).flatten(2).transpose(1, 2).flip(1)

        def forward_head(self, tokens):
            return tokens.mean(1)[:, :3]

        def forward_intermediates(self, images, **_):
            return [self.embed(images)]

    with pytest.raises(ValueError, match="not those of a map line by line"):
        global_local_features(Shuffled(), torch.randn(1, 3, 64, 64))
    del Shuffled.forward_intermediates
    with pytest.raises(ValueError, match="not those of a map line by line"):
        global_local_features(Shuffled(), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("side", [3, 5])
def test_a_grid_finer_than_a_map_of_tokens_is_refused(side):
    model = create("vit_tiny_patch16_224", dict(img_size=32))
    with pytest.raises(ValueError, match=f"grid={side} needs a feature map of at least"):
        global_local_features(model, torch.randn(1, 3, 32, 32), side)


def test_the_state_of_a_model_is_as_before_the_check_of_its_tokens():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.5)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    maps._fold(model, model.forward_features(torch.zeros(1, 3, 32, 32)), torch.zeros(1, 3, 32, 32))
    used = torch.get_rng_state()
    torch.set_rng_state(state)
    global_local_features(model, torch.zeros(1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), used)
    assert [module.training for module in model.modules()] == modes


@torch.no_grad()
def test_cells_equal_adaptive_pooling_of_a_map_with_channels_last():
    values = torch.randn(2, 7, 5, 8, dtype=torch.float64)
    found = maps.FeatureMap(values.permute(0, 3, 1, 2), "NHWC")
    expected = F.adaptive_avg_pool2d(values.permute(0, 3, 1, 2), 3).flatten(2).mT
    torch.testing.assert_close(found.rows(3)[:, 1:], expected, rtol=1e-12, atol=1e-12)
