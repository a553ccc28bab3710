"""timm's contract for every `gld_*` model, the paper's parameter counts, and the weights that ship.

`tests/timm_suite.py` runs timm's own tests; these mirror them offline.
"""

import copy
import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureInfo, get_pretrained_cfg

import gld_zoo

MODELS = timm.list_models("gld_*")
SMALL = [name for name in MODELS if name not in ("gld_resnet18", "gld_resnet34")]
every_model = pytest.mark.parametrize("name", MODELS)

PARAMETERS = dict(
    gld_resnet20=278_324,
    gld_resnet32=472_756,
    gld_resnet44=667_188,
    gld_resnet56=861_620,
    gld_resnet110=1_736_564,
    gld_wrn16_1=180_916,
    gld_wrn16_2=703_284,
    gld_wrn16_4=2_772_020,
    gld_wrn22_4=4_322_100,
)


def images_for(model, batch=2):
    channels, *size = model.pretrained_cfg["input_size"]
    return torch.randn(batch, channels, *(min(96, side) for side in size))


def test_the_eleven_architectures_are_registered():
    assert set(MODELS) == {*PARAMETERS, "gld_resnet18", "gld_resnet34"}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_papers(name, count):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("depth", [18, 34])
@torch.no_grad()
def test_timm_weights_load_unchanged(depth):
    theirs = timm.create_model(f"resnet{depth}", num_classes=1000).eval()
    ours = timm.create_model(f"gld_resnet{depth}", num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@every_model
def test_convolutions_start_from_he_fan_out_and_no_norm_at_zero(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all()


@every_model
def test_backward_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=42, drop_rate=0.1).train()
    output = model(images_for(model))
    assert output.shape == (2, 42)
    output.square().mean().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@every_model
def test_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert model.in_chans == cfg["input_size"][0]
    assert cfg["license"]
    assert cfg["classifier"] + ".weight" in model.state_dict()
    assert cfg["first_conv"] + ".weight" in model.state_dict()
    features = model.forward_features(torch.empty(2, *cfg["input_size"], device="meta"))
    assert tuple(features.shape) == (2, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@every_model
def test_classifier_reset_keeps_pooling_device_dtype_and_mode(name):
    model = timm.create_model(name, dtype=torch.float64).eval()
    images = images_for(model).double()
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.get_classifier().training
    model.reset_classifier(7, "max")
    model.reset_classifier(5)
    assert model.global_pool.pool_type == "max"
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(images).ndim == 4
    created = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    assert created(images.to("meta", torch.float32)).shape == model(images).shape
    model.reset_classifier(3, "catavgmax")
    assert model(images).shape == (2, 3)
    assert model.head_hidden_size == 2 * model.num_features


@every_model
def test_constructor_takes_device_and_refuses_unknown_options(name):
    model = timm.create_model(name, device="meta", in_chans=1, num_classes=3)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])
    assert model(torch.empty(1, 1, 64, 64, device="meta")).shape == (1, 3)
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", no_such_option=1)


@every_model
def test_features_only_gives_the_announced_channels_and_strides(name):
    model = timm.create_model(name, features_only=True).eval()
    images = images_for(model)
    with torch.no_grad():
        outputs = model(images)
    assert [output.shape[1] for output in outputs] == model.feature_info.channels()
    assert [
        images.shape[-1] // output.shape[-1] for output in outputs
    ] == model.feature_info.reduction()
    assert model.feature_info.reduction() == ([1, 2, 4] if name in SMALL else [2, 4, 8, 16, 32])


@every_model
@torch.no_grad()
def test_intermediates_agree_with_features_pruning_and_checkpointing(name):
    model = timm.create_model(name).eval()
    images = images_for(model)
    info = FeatureInfo(model.feature_info, list(range(len(model.feature_info))))
    final, taps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [tap.shape[1] for tap in taps] == info.channels()
    last = len(taps) - 1
    for index, tap in enumerate(taps):
        stopped = model.forward_intermediates(
            images, indices=[index], stop_early=True, intermediates_only=True
        )
        assert torch.equal(stopped[0], tap)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index], prune_norm=True) == [index]
        if index < last:
            assert torch.equal(pruned.forward_features(images), tap)
            assert pruned.num_features == tap.shape[1]
    kept = copy.deepcopy(model)
    kept.prune_intermediate_layers([last], prune_head=False)
    assert torch.equal(kept(images), model(images))
    model.set_grad_checkpointing()
    assert torch.equal(model.forward_features(images), final)
    assert torch.equal(model.forward_intermediates(images, intermediates_only=True)[-1], taps[-1])


@pytest.mark.parametrize("name", ["gld_resnet20", "gld_wrn16_1", "gld_resnet18"])
def test_checkpointing_keeps_gradients(name):
    model = timm.create_model(name).train()
    images = images_for(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@every_model
def test_parameter_groups_cover_blocks(name):
    model = timm.create_model(name, device="meta")
    coarse, fine = (
        timm.models.group_parameters(model, model.group_matcher(coarse=value))
        for value in (True, False)
    )
    assert 1 < len(coarse) < len(fine)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("output_stride", [1, 2, 4])
def test_output_stride_dilates_and_keeps_the_state_dict(name, output_stride):
    model = timm.create_model(name, output_stride=output_stride, device="meta")
    features = model.forward_features(torch.empty(1, 3, 32, 32, device="meta"))
    assert features.shape[-1] == 32 // output_stride
    assert model.feature_info[-1]["reduction"] == output_stride
    assert model.state_dict().keys() == timm.create_model(name, device="meta").state_dict().keys()


@pytest.mark.parametrize("options", [dict(output_stride=3), dict(depth=21)])
@pytest.mark.parametrize("name", ["gld_resnet20", "gld_wrn16_1"])
def test_impossible_architectures_are_named(name, options):
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        timm.create_model(name, **options)


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_scripts_compiles_and_exports(name):
    torch._dynamo.reset()  # or eleven models of the same code exceed its limit of recompilations
    model = timm.create_model(name).eval()
    images = images_for(model)
    expected = model(images)
    # fused kernels round otherwise, 1e-7 a layer, and random weights blow the logits up
    close = functools.partial(
        torch.testing.assert_close, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    close(torch.jit.script(model)(images), expected)
    close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    close(exported(torch.cat([images, images])), torch.cat([expected, expected]))


@pytest.mark.parametrize("size", [32, 64, 96, 225])
@torch.no_grad()
def test_other_input_sizes(size):
    for name in ("gld_resnet20", "gld_wrn16_1", "gld_resnet18"):
        model = timm.create_model(name, num_classes=5).eval()
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


UNTRAINED = [name for name in MODELS if not get_pretrained_cfg(name).has_weights]
WEIGHTS = [
    name
    for name in timm.list_models("gld_*", include_tags=True)
    if get_pretrained_cfg(name).has_weights
]


@pytest.mark.parametrize("name", UNTRAINED)
def test_without_weights_pretrained_is_an_error(name):
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", MODELS)
def test_untrained_tag_stands_only_where_no_weights_are(name):
    tags = {
        tag.split(".")[1]
        for tag in timm.list_models(f"{name}*", include_tags=True)
        if tag.split(".")[0] == name
    }
    assert ("untrained" in tags) == (name in UNTRAINED)


@pytest.mark.parametrize("name", WEIGHTS)
@torch.no_grad()
def test_weights_give_their_stored_logits(name):
    model = timm.create_model(name, pretrained=True).eval()
    stored = json.loads(
        (Path(gld_zoo.__file__).parent / "weights" / f"{name}.logits.json").read_text()
    )
    cfg = model.pretrained_cfg
    pixels = torch.tensor(stored["images"], dtype=torch.float32) / 255  # [B, H, W, 3]
    images = ((pixels - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])).permute(0, 3, 1, 2)
    # other processors sum convolutions in another order: 1e-6 a layer
    torch.testing.assert_close(model(images), torch.tensor(stored["logits"]), rtol=1e-4, atol=1e-3)


def test_weights_ship():
    assert WEIGHTS


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_adapt_to_other_classes_and_channels(name):
    trained = timm.create_model(name, pretrained=True)
    model = timm.create_model(name, pretrained=True, num_classes=10, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    first = trained.pretrained_cfg["first_conv"]
    stem = trained.get_submodule(first).weight.sum(1, keepdim=True)  # timm's way to one channel
    # it keeps the sum in the file's type, which may be float16
    torch.testing.assert_close(model.get_submodule(first).weight, stem, rtol=1e-3, atol=1e-3)
    for (key, value), other in zip(
        trained.layer2.state_dict().items(), model.layer2.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
