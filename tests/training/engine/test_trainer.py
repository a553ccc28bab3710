"""The training loop's step from inside: nothing that waits for a device, one loss for all."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from datasets import ClassLabel, Features, Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from gld_zoo import GlobalLocal, global_local_logits, logit_kl, relation
from gld_zoo.distillation.heads import classifiers
from gld_zoo.distillation.teacher import Teacher
from gld_zoo.hub import save_pretrained
from gld_zoo.training.build.create import GlobalOnly, create_student, set_training_mode
from gld_zoo.training.commands.distill import cli
from gld_zoo.training.common.devices import check_accelerator
from gld_zoo.training.common.errors import ModelError, RunError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller
from gld_zoo.training.tasks.labels import smooth
from helpers import read_lines, write_dataset

READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}
NEVER = SimpleNamespace(due=lambda step, last: (False, False))  # an Interruption
METHODS = {"cpu", "tolist", "numpy", "item"}  # which do nothing to be seen on a CPU


class Operations(TorchDispatchMode):
    """Collect the names of the operations that run, and of `watch`ed methods."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def watch(self, monkeypatch):
        for name in METHODS:
            method = getattr(torch.Tensor, name)

            def watched(*args, _name=name, _method=method, **kwargs):
                self.names.add(_name)
                return _method(*args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, watched)
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def build(tiny_dataset, tmp_path, **options):
    options = dict(dict(student="gld_wrn16_1", dataset=str(tiny_dataset), batch_size=16), **options)
    recipe = Recipe(**options)
    trainer = Trainer(
        Distiller(recipe, Accelerator()), RunFolder(tmp_path / "run", recipe, resume=False)
    )
    trainer.task.network.train()
    return trainer


def test_the_paper_s_optimiser_steps_over_all_weights_at_once(tiny_dataset, tmp_path):
    """Fused: as many operations for a model of ten times as many weights."""
    counts = []
    for student in ("gld_wrn16_1", "gld_resnet110"):
        trainer = build(tiny_dataset, tmp_path / student, student=student)
        for weight in trainer.task.model.parameters():
            weight.grad = torch.zeros_like(weight)
        trainer.optimizer.step()  # the first makes the momentum
        with Counted() as operations:
            trainer.optimizer.step()
        counts.append(operations.count)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("distilled", [True, False])
def test_steps_read_nothing_from_the_device(
    tiny_dataset, teacher_run, tmp_path, distilled, monkeypatch
):
    teacher = f"local-dir:{teacher_run}/last" if distilled else None
    trainer = build(tiny_dataset, tmp_path, teacher=teacher)
    batches = trainer.data.train.epoch(0)
    next(batches)  # an epoch's order and augmentation are drawn on the CPU, once
    with Operations().watch(monkeypatch) as operations:
        for images, target in batches:
            trainer.state.totals.add(*trainer.step(images, target))
    assert {"convolution"} <= operations.names  # so that operations are known to be seen
    assert not operations.names & (READS | METHODS)
    with operations:
        trainer.state.totals.check(3, 0)  # which reads, is seen
    assert {"cpu", "tolist", "nonzero"} & operations.names
    assert trainer.state.totals.means()["loss"] > 0


def test_two_steps_are_those_of_sgd_written_out(tiny_dataset, tmp_path):
    options = dict(lr=0.05, momentum=0.8, weight_decay=0.01)
    trainer = build(tiny_dataset, tmp_path, **options)
    network, theirs = copy.deepcopy(trainer.task.network), []
    for images, target in itertools.islice(trainer.data.train.epoch(0), 2):
        network.zero_grad()
        F.cross_entropy(network(images), target).backward()
        with torch.no_grad():
            theirs = [
                (theirs[i] * 0.8 if theirs else 0) + weight.grad + 0.01 * weight
                for i, weight in enumerate(network.parameters())
            ]
            for weight, momentum in zip(network.parameters(), theirs, strict=True):
                weight -= 0.05 * momentum
        trainer.set_learning_rate(0)
        trainer.step(images, target)
    for ours, expected in zip(trainer.task.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_recipes_weights_and_grid_are_those_of_the_loss(tiny_dataset, teacher_run, tmp_path):
    teacher = f"local-dir:{teacher_run}/last"
    options = dict(alpha=0.25, beta=30.0, local_weight=2.5, grid=3)
    trainer = build(tiny_dataset, tmp_path, teacher=teacher, **options)
    images, target = next(trainer.data.train.epoch(0))
    terms, _ = trainer.task.forward(images, target)
    student, taught = trainer.task.network(images), trainer.task.teacher(images)
    assert student.shape[1] == 1 + 9
    divergence = logit_kl(student, taught).mean(0)
    expected = dict(
        loss_ce=0.75 * F.cross_entropy(student[:, 0], target),
        loss_global=0.25 * divergence[0],
        loss_local=2.5 * divergence[1:].sum(),
        loss_relation=30 * relation(student.flatten(0, 1), taught.flatten(0, 1)),
    )
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_the_loss_is_cross_entropy(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path)
    images, target = next(trainer.data.train.epoch(0))
    terms, others = trainer.task.forward(images, target)
    assert torch.equal(terms["loss"], F.cross_entropy(trainer.task.network(images), target))
    assert others.keys() == {"train_top1", "train_top5"}


def test_both_classifiers_of_a_model_are_trained_alone(tmp_path):
    save_pretrained(timm.create_model("efficientformerv2_s0", num_classes=4), tmp_path)
    student = create_student(
        f"local-dir:{tmp_path}", list("abcd"), torch.device("cpu"), finetune="classifier"
    )
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"head", "head_dist"}
    set_training_mode(student, "classifier")
    assert [part.training for part in classifiers(student)] == [True, True]
    assert not student.stem.training


@torch.no_grad()
def test_a_model_of_several_branches_is_trained_on_labels_alone():
    model = timm.create_model("crossvit_9_240", num_classes=3).eval()
    images = torch.randn(1, 3, 240, 240)
    assert torch.equal(GlobalOnly(model)(images), model(images))
    with pytest.raises(ValueError, match="forward_features gives list for images"):
        GlobalLocal(model)(images)


def test_every_step_has_its_seed_and_rate(tiny_dataset, tmp_path):
    trainer, seen = build(tiny_dataset, tmp_path, epochs=2, lr=0.8, schedule="linear"), []

    def step(*batch):
        seen.append((torch.rand(1).item(), trainer.optimizer.param_groups[0]["lr"]))
        return dict(loss=torch.tensor(1.0)), {}

    trainer.step = step
    for epoch in range(2):
        trainer.train_one_epoch(epoch, NEVER)
    draws, rates = zip(*seen, strict=True)
    assert len(set(draws)) == 8
    assert rates == pytest.approx([0.8 * (1 - i / 8) for i in range(8)])


def test_an_epoch_whose_steps_were_done_keeps_its_last_rate(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, epochs=2, lr=0.8, schedule="linear")
    trainer.state.position = (0, 4)
    trainer.train_one_epoch(0, NEVER)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.8 * (1 - 3 / 8))


def test_held_out_images_select_and_the_test_split_is_measured_last(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, val_fraction=0.25)
    measured, exported, scores = [], [], iter([10.0, 30.0, 30.0, 20.0, 5.0])

    def measure(model, batches):
        measured.append(batches)
        return dict(loss=1.0, top1=next(scores), top5=50.0)

    trainer.task.measure = measure
    trainer.write_model = lambda name: exported.append((name, len(measured)))
    for epoch in range(4):
        trainer.state.totals.add(dict(loss=torch.tensor(1.0)), dict(train_top1=torch.tensor(1.0)))
        trainer.state.totals.check(1, epoch)
        trainer.close_epoch(epoch)
    summary = trainer.finish()
    assert [batches is trainer.data.val for batches in measured] == [True] * 4 + [False]
    assert exported == [("best", 1), ("best", 2), ("last", 5)]
    assert (summary["top1"], summary["best_epoch"]) == (5.0, 2)


def test_training_accuracy_is_of_the_global_rows(tiny_dataset, teacher_run, tmp_path):
    trainer = build(tiny_dataset, tmp_path, teacher=f"local-dir:{teacher_run}/last")
    rows = torch.eye(4)[[0, 1, 1, 1, 1]].expand(16, 5, 4).clone().requires_grad_()
    trainer.task.network = lambda images: rows
    images, _ = next(trainer.data.train.epoch(0))
    _, others = trainer.task.forward(images, torch.zeros(16, dtype=torch.int64))
    assert others["train_top1"] == 100
    assert trainer.task.criterion.global_batch


def test_class_names_are_saved_in_the_datasets_order(rows, tmp_path):
    names = ["pear", "fig", "apple", "kiwi"]
    features = Features(img=Image(), fine_label=ClassLabel(names=names))
    trainer = build(write_dataset(tmp_path / "data", rows, features), tmp_path)
    trainer.write_model("last")
    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert config["label_names"] == names


@torch.no_grad()
def test_a_teacher_of_another_normalisation_sees_the_same_pixels():
    model = timm.create_model("gld_wrn16_2", pretrained=True).eval()
    pixels, cfg = torch.rand(2, 3, 32, 32), model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    expected = global_local_logits(model, (pixels - mean) / std)
    teacher, given = Teacher(model, 2, (0.5,) * 3, (0.25,) * 3), (pixels - 0.5) / 0.25
    torch.testing.assert_close(teacher(given), expected, rtol=1e-4, atol=1e-4)  # float32
    torch.testing.assert_close(teacher.classify(given), expected[:, 0], rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in teacher.train().modules())


def test_averaged_weights_are_measured_exported_and_told_beside_the_raw_ones(
    tiny_dataset, tmp_path, distill
):
    options = ["--student", "gld_wrn16_1", "--dataset", tiny_dataset, "--batch_size", 16]
    options += ["--epochs", 2, "--threads", 1, "--run"]
    distill(*options, tmp_path / "plain")
    printed = distill(*options, tmp_path / "averaged", "--ema", 0.9)
    lines = read_lines(tmp_path / "averaged" / "metrics.jsonl")
    plain = read_lines(tmp_path / "plain" / "metrics.jsonl")
    # the average has no say in what is learnt
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert [line["test_raw_top1"] for line in lines] == [line["test_top1"] for line in plain]
    assert f"(without averaging {plain[-1]['test_top1']:.2f})" in printed
    summary = json.loads((tmp_path / "averaged" / "summary.json").read_text())
    assert summary["top1"] == lines[-1]["test_top1"]
    assert summary["raw_top1"] == plain[-1]["test_top1"]
    raw, last = (
        load_file(tmp_path / name / "last" / "model.safetensors") for name in ("plain", "averaged")
    )
    checkpoint = tmp_path / "averaged" / "checkpoints" / "epoch-00002"
    kept, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "average"))
    for name in raw:
        assert torch.equal(kept[name], raw[name])
        assert torch.equal(average[name], last[name])
    assert not torch.equal(last["fc.weight"], raw["fc.weight"])


def test_an_average_is_of_every_step_with_a_warm_up(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, ema=0.5, epochs=2)
    seen = []
    step = trainer.step

    def watched(*batch):
        terms = step(*batch)
        seen.append(trainer.task.student.fc.weight.detach().clone())
        return terms

    trainer.step = watched
    for epoch in range(2):
        trainer.train_one_epoch(epoch, NEVER)
    expected = seen[0]  # the first step's weights, whatever came before
    for number, weights in enumerate(seen[1:], 2):
        decay = min(0.5, 1 - number ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(trainer.result.fc.weight, expected)


def test_nothing_is_measured_twice(tiny_dataset, teacher_run, tmp_path, monkeypatch):
    """The teacher once, the test split once an epoch, and nothing anew when a run goes on."""
    measured = []
    score = Distiller._score

    def counted(self, predict, batches):
        measured.append("teacher" if predict == self.teacher.classify else "student")
        return score(self, predict, batches)

    monkeypatch.setattr(Distiller, "_score", counted)
    options = ["--student", "gld_wrn16_1", "--dataset", tiny_dataset, "--batch_size", 16]
    options += ["--teacher", f"local-dir:{teacher_run}/last", "--threads", 1]
    options = [str(option) for option in [*options, "--epochs", 2, "--run", tmp_path / "run"]]
    cli([*options, "--max_minutes", "0"])
    assert measured == ["teacher", "student"]
    cli([*options, "--resume", "--max_minutes", "null"])
    assert measured == ["teacher", "student", "student", "student"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (summary["top1"], summary["top5"]) == (last["test_top1"], last["test_top5"])
    assert summary["test_loss"] == last["test_loss"]
    assert summary["teacher"]["top1"] > 0


def test_epochs_between_measurements_have_no_score_and_the_last_one_has(
    tiny_dataset, tmp_path, distill
):
    options = ["--student", "gld_wrn16_1", "--dataset", tiny_dataset, "--batch_size", 16]
    options += ["--epochs", 5, "--measure_every", 2, "--threads", 1, "--run", tmp_path / "run"]
    printed = distill(*options)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines if "test_top1" in line] == [2, 4, 5]
    assert all("train_top1" in line for line in lines)
    assert "epoch 1/5  top-1 train" in printed
    assert "epoch 2/5  top-1 test" in printed


@pytest.mark.slow
def test_curves_are_drawn_at_most_once_a_minute_and_at_the_end(tiny_dataset, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "gld_zoo.training.runs.run_folder.draw_curves",
        lambda history, path, *_: (drawn.append(len(history)), path.touch()),
    )
    options = ["--student", "gld_wrn16_1", "--dataset", tiny_dataset, "--batch_size", 16]
    options += ["--epochs", 4, "--threads", 1, "--run", tmp_path / "run"]
    cli([str(option) for option in options])
    assert drawn == [4]
    monkeypatch.setattr("gld_zoo.training.runs.run_folder.REDRAW_SECONDS", 0.0)
    cli([str(option) for option in [*options[:-1], tmp_path / "often"]])
    assert drawn == [4, 1, 2, 3, 4]


def test_smoothed_labels_are_those_of_torch(tiny_dataset, teacher_run, tmp_path):
    logits, target = torch.randn(16, 4), torch.randint(4, (16,))
    expected = F.cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, smooth(target, 4, 0.2)), expected)
    images = torch.randn(16, 3, 32, 32)
    for teacher in (None, f"local-dir:{teacher_run}/last"):
        trainer = build(
            tiny_dataset,
            tmp_path / str(bool(teacher)),
            teacher=teacher,
            label_smoothing=0.2,
            alpha=0.5,
        )
        rows = logits if teacher is None else logits[:, None].expand(16, 5, 4)
        trainer.task.network = lambda images, rows=rows: rows
        terms, _ = trainer.task.forward(images, target)
        torch.testing.assert_close(terms["loss_ce"], expected * (1 if teacher is None else 0.5))


def test_a_teachers_weights_kept_in_bf16_give_the_same_bits(monkeypatch):
    model = timm.create_model("gld_wrn16_2", pretrained=True).eval().requires_grad_(False)
    cfg, images = model.pretrained_cfg, torch.randn(4, 3, 32, 32)
    teacher = Teacher(model, 2, cfg["mean"], cfg["std"])
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher(images)
    with Operations() as operations, torch.autocast("cpu", torch.bfloat16):
        teacher(images)
    assert "_to_copy" in operations.names
    teacher.keep_in(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), expected)
    kinds = {weight.dtype for weight in teacher.model.get_classifier().parameters()}
    assert kinds == {torch.float32}  # the head's logits are float32


def test_the_students_own_options_reach_timm_and_its_folder(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, student="resnet18", student_args=dict(stem_type="deep"))
    assert isinstance(trainer.task.student.conv1, torch.nn.Sequential)
    trainer.write_model("last")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert isinstance(loaded.conv1, torch.nn.Sequential)
    for options, message in (
        (dict(num_classes=7), "num_classes is the trainer's"),
        (dict(stemtype="deep"), "unexpected keyword argument"),
        (dict(features_only=True), "features_only is the trainer's"),
        (dict(output_stride=7), "cannot be created: it does not take the value of an option"),
        (dict(act_layer="relux"), "timm does not know 'relux'"),
    ):
        with pytest.raises(ModelError, match=message):
            build(tiny_dataset, tmp_path / "other", student="resnet18", student_args=options)


@pytest.mark.slow
def test_checkpointed_gradients_are_the_same(tiny_dataset, tmp_path):
    gradients = []
    images, target = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    for checkpointing in (False, True):
        trainer = build(
            tiny_dataset, tmp_path / str(checkpointing), grad_checkpointing=checkpointing
        )
        assert trainer.task.student.grad_checkpointing == checkpointing
        terms, _ = trainer.task.forward(images, target)
        terms["loss"].backward()
        gradients.append(trainer.task.student.fc.weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(ModelError, match="has no grad_checkpointing"):
        build(tiny_dataset, tmp_path / "x", student="vgg11", grad_checkpointing=True)


def introduction(*arguments, **options):
    """Return what a run tells before it trains."""
    trainer = build(*arguments, **options)
    trainer.task.prepare(trainer.run.path)
    return trainer.task.introduction()


def test_the_relations_weight_follows_the_batch_unless_it_is_stated(
    tiny_dataset, teacher_run, tmp_path
):
    assert Recipe(student="x").beta == 500
    assert Recipe(student="x", batch_size=128).beta == 1000
    assert Recipe(student="x", batch_size=32, grid=[2, 4]).beta == 500 * 32 * 21 / 320
    assert Recipe(student="x", batch_size=128, beta=500.0).beta == 500
    teacher = f"local-dir:{teacher_run}/last"
    lines = introduction(tiny_dataset, tmp_path / "a", teacher=teacher)
    assert "beta 125: the paper's 500 scaled to the rows of a batch" in lines
    lines = introduction(tiny_dataset, tmp_path / "b", teacher=teacher, beta=500.0)
    assert not any("beta" in line for line in lines)
    with pytest.raises(ValueError, match=r"beta=-1\.0 must be auto, or finite"):
        Recipe(student="x", beta=-1.0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_compiled_whole_the_loss_too(tiny_dataset, teacher_run, tmp_path):
    images, target = torch.randn(16, 3, 32, 32), torch.randint(4, (16,))
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = dict(teacher=f"local-dir:{teacher_run}/last", compile=compiled)
        trainer = build(tiny_dataset, tmp_path / str(compiled), **options)
        terms, _ = trainer.step(images, target)
        losses.append(terms["loss"])
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        # student, teacher and loss
        assert counters["frames"]["ok"] == counters["frames"]["total"] == (3 if compiled else 0)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)  # fused sums are taken in another order


def test_what_accelerate_cannot_be_set_to_is_refused(tiny_dataset, tmp_path):
    accelerator = SimpleNamespace(
        gradient_accumulation_steps=1,
        distributed_type=DistributedType.NO,
        mixed_precision="fp8",
        device=torch.device("cuda"),
        num_processes=1,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    )
    with pytest.raises(RunError, match="fp8 is not supported"):
        check_accelerator(accelerator)
    accelerator.mixed_precision = "no"
    check_accelerator(accelerator)
    accelerator.state.dynamo_plugin.backend = DynamoBackend.INDUCTOR
    with pytest.raises(RunError, match=r"compile by INDUCTOR.*--compile true"):
        check_accelerator(accelerator)
