"""GLD as a task of timm's training loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model

from gld_zoo.distillation.heads import GlobalLocal
from gld_zoo.distillation.losses import GLDLoss
from gld_zoo.distillation.maps import Grid


class GLDTask(LogitDistillationTask):
    """Distil a student from a teacher by GLD, as timm's `TrainingTask`s do.

    What timm validates, averages and saves is the student itself; the wrapper that adds the local
    logits is trained and, by `prepare_distributed`, wrapped in data parallelism.

    Args:
        student_model: Any timm model that `global_local_logits` takes.
        teacher_model: Such a model in eval mode, its timm name, or timm's `DistillationTeacher`,
            which draws a new classifier if it is asked for other classes than the weights have.
        grid: Cells along each side of the feature map, the paper's d, or several such numbers.
        alpha: Share of the global distillation against cross-entropy, 0 to 1.
        beta: Weight of the relation; scale it by batch size times (1 + grid^2) over 320.
        local_weight, temperature, standardise, disagreement, ce_weight, global_weight: As for
            `GLDLoss`.
        global_batch: Take the relation over all processes' batches. Gradient accumulation cannot be
            mended so: the relation spans a whole batch and does not add up over parts.
        **kwargs: `device`, `dtype`, `verbose`, `teacher_pretrained_path` and
            `teacher_pretrained_cfg_overlay`, as for `LogitDistillationTask`.

    Raises:
        ValueError: If the student's and the teacher's numbers of classes differ, a weight is out of
            its range, or a model has no local logits at this grid.

    Source: GLD (ICCV 2021); the interface is timm's `TrainingTask`.

    Example:
        ```python
        task = gld_zoo.GLDTask(student, "gld_wrn16_2")
        result = task(images, target)
        result["loss"].backward()
        ```
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module | DistillationTeacher,
        *,
        grid: Grid = 2,
        alpha: float = 0.7,
        beta: float = 500.0,
        local_weight: float = 1.0,
        global_batch: bool = True,
        temperature: float = 1.0,
        standardise: bool = True,
        disagreement: float = 1.0,
        ce_weight: float | None = None,
        global_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        criterion = GLDLoss(
            alpha,
            beta,
            local_weight=local_weight,
            global_batch=global_batch,
            temperature=temperature,
            standardise=standardise,
            disagreement=disagreement,
            ce_weight=ce_weight,
            global_weight=global_weight,
        )
        kwargs.setdefault("verbose", False)
        super().__init__(student_model, teacher_model, criterion, **kwargs)
        _check_classes(student_model, unwrap_model(self.teacher.model), teacher_model)
        self.teacher.requires_grad_(False)
        self.trainable_module = GlobalLocal(student_model, grid)
        self.teacher_rows = GlobalLocal(self.teacher.model, grid)

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the training forward of both models and the student's forward for validation."""

        def compiled(module: Any) -> Any:
            return torch.compile(module, backend=backend, mode=mode, **compile_kwargs)

        self.eval_model = compiled(self.get_eval_model())
        self.trainable_module = compiled(self.trainable_module)
        self.teacher_rows = compiled(self.teacher_rows)
        return self.eval_model

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> nn.Module | None:
        """Return the student, or its average, without what adds the local logits."""
        found = super().get_eval_model(module, ema=ema)
        inner = None if found is None else unwrap_model(found)
        return inner.model if isinstance(inner, GlobalLocal) else found

    def train(self, mode: bool = True) -> GLDTask:
        """Set the training mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher_rows.eval()
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Train on a batch.

        Args:
            input: Images `[B, C, H, W]`, normalised for the student.
            target: Classes `[B]`, or probabilities `[B, K]` of mixed labels.

        Returns:
            `loss` and its weighted terms (`loss_ce`, `loss_global`, `loss_local`,
            `loss_relation`), and `output`, the student's logits `[B, K]`.
        """
        logits = self.trainable_module(input)
        with torch.no_grad():
            normalized = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits = self.teacher_rows(normalized)
        return dict(self.criterion(logits, teacher_logits, target), output=logits[:, 0])


def _check_classes(student: Any, teacher: Any, given: Any) -> None:
    theirs = teacher.num_classes
    if isinstance(given, str):  # timm gives it a new head of the student's classes without a word
        theirs = teacher.pretrained_cfg.get("num_classes", theirs)
    if student.num_classes != theirs:
        raise ValueError(
            f"the student has {student.num_classes} classes and the teacher {theirs}; use a "
            "teacher trained on the student's classes"
        )
