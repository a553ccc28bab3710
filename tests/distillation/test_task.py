"""GLD in timm's training loop: the loss is ours, the contract is timm's."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from timm.utils import CheckpointSaver

from gld_zoo import GLDLoss, GLDTask, global_local_logits

TEACHER = "gld_wrn16_2"


def example(batch=4):
    return torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))


@pytest.fixture
def task():
    return GLDTask(timm.create_model("gld_wrn16_1"), TEACHER).train()


def test_the_loss_and_its_gradient_are_those_written_out(task):
    assert isinstance(task, TrainingTask)
    images, target = example()
    student = copy.deepcopy(task.get_eval_model())
    teacher = timm.create_model(TEACHER, pretrained=True).eval()
    with torch.no_grad():
        wanted = global_local_logits(teacher, images)
    logits = global_local_logits(student, images)
    expected = GLDLoss()(logits, wanted, target)
    expected["loss"].backward()
    result = task(images, target)
    result["loss"].backward()
    assert set(result) == {*expected, "output"}
    for name, term in expected.items():
        torch.testing.assert_close(result[name], term)
    torch.testing.assert_close(result["output"], logits[:, 0])
    for ours, theirs in zip(task.get_eval_model().parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert not any(weight.requires_grad for weight in task.teacher.parameters())
    assert not task.teacher.model.training


def test_a_teacher_of_another_normalisation_sees_the_same_pixels():
    student = timm.create_model("gld_wrn16_1")
    student.pretrained_cfg = dict(student.pretrained_cfg, mean=(0.5,) * 3, std=(0.25,) * 3)
    task = GLDTask(student, TEACHER)
    seen = []
    task.teacher_rows.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pixels, target = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    task((pixels - 0.5) / 0.25, target)
    cfg = task.teacher.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen[0], (pixels - mean) / std, rtol=1e-4, atol=1e-5)


def test_what_timm_saves_is_the_student_and_what_it_loads_too(task, tmp_path):
    optimizer = create_optimizer_v2(task.get_eval_model(), "sgd", lr=0.01)
    saver = CheckpointSaver(task.get_eval_model(), optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    state = task.get_checkpoint_state()["state_dict"]
    assert set(state) == set(timm.create_model("gld_wrn16_1").state_dict())
    other = GLDTask(timm.create_model("gld_wrn16_1"), TEACHER)
    other.load_checkpoint_state(state)
    images, _ = example()
    outputs = [one.get_eval_model().eval()(images) for one in (task, other)]
    assert torch.equal(*outputs)


def test_an_average_of_the_student_is_kept_and_validated(task):
    task.setup_ema(decay=0.5)
    before = task.get_eval_model(ema=True).fc.weight.clone()
    with torch.no_grad():
        task.get_eval_model().fc.weight += 1
    task.update_ema()
    after = task.get_eval_model(ema=True)
    torch.testing.assert_close(after.fc.weight, before + 0.5)
    assert after(example()[0]).shape == (4, 100)


def test_it_learns_by_timms_optimizer(task):
    images, target = example(8)
    optimizer = create_optimizer_v2(task.get_eval_model(), "sgd", lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = task(images, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_data_parallelism_wraps_the_training_forward(task, tmp_path):
    images, target = example()
    expected = task(images, target)["loss"]
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        task.prepare_distributed()
        loss = task(images, target)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert task.get_eval_model().fc.weight.grad is not None
        assert set(task.get_checkpoint_state()["state_dict"]) == set(
            timm.create_model("gld_wrn16_1").state_dict()
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_task_gives_the_same(task):
    images, target = example()
    expected = task.eval()(images, target)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = task.compile(backend="eager")
    result = task(images, target)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for name, term in expected.items():
        torch.testing.assert_close(result[name], term)
    torch.testing.assert_close(model(images), expected["output"])
    assert set(task.get_checkpoint_state()["state_dict"]) == set(
        timm.create_model("gld_wrn16_1").state_dict()
    )


@pytest.mark.parametrize("given", [TEACHER, "module"])
def test_a_teacher_of_other_classes_is_refused(given):
    teacher = timm.create_model(TEACHER) if given == "module" else given
    with pytest.raises(ValueError, match="the student has 7 classes and the teacher 100"):
        GLDTask(timm.create_model("gld_wrn16_1", num_classes=7), teacher)


def test_the_weights_and_the_grid_given_are_those_of_the_loss():
    options = dict(alpha=0.25, beta=30.0, local_weight=2.5)
    student = timm.create_model("gld_wrn16_1")
    task = GLDTask(student, TEACHER, grid=4, global_batch=False, **options).eval()
    assert not task.criterion.global_batch
    images, target = example()
    with torch.no_grad():
        rows = [global_local_logits(model, images, 4) for model in (student, task.teacher.model)]
        result = task(images, target)
    for name, term in GLDLoss(**options)(*rows, target).items():
        torch.testing.assert_close(result[name], term)


def test_a_transformer_teaches_a_network_of_convolutions():
    """Its tokens are averaged cell by cell; one that classifies its class token is refused."""
    images, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    options = dict(img_size=64, depth=2, num_classes=3)
    teacher = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **options).eval()
    torch.nn.init.normal_(teacher.head.weight)
    student = timm.create_model("gld_resnet18", num_classes=3)
    result = GLDTask(student, teacher)(images, target)
    result["loss"].backward()
    assert all(value.isfinite() for value in result.values() if value.ndim == 0)
    assert all(parameter.grad is not None for parameter in student.parameters())
    token = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.nn.init.normal_(token.head.weight)
    with pytest.raises(ValueError, match="class token"):
        GLDTask(timm.create_model("gld_resnet18", num_classes=3), token)(images, target)
