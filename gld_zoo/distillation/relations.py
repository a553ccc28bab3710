"""The relations among all rows of a batch, in two exact forms, over one process's batch or all's.

Kim et al., "Distilling Global and Local Logits with Densely Connected Relations", ICCV 2021. The
linear form is ours: the inner products of distance rows are polynomials in moments of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from gld_zoo.distillation._distributed import add_up, check_equal_rows, gather, is_distributed

# The plain form works on this many entries of a distance matrix at a time: 4 MiB of float32, which
# stay in a core's cache between the dozen operations on them.
_BLOCK_ENTRIES = 1 << 20


def relation(
    student: torch.Tensor, teacher: torch.Tensor, *, global_batch: bool = False
) -> torch.Tensor:
    """Compare the relations among all rows of two models: `1/N² sum (D(teacher) - D(student))²`.

    D holds the squared Euclidean distances between all rows, each of its rows divided by that row's
    L2 norm, so that the two sides need not be of one width. Two exact forms, chosen by shape: a
    linear-time one over moments of the batch, O(N (K² + K D + D²)), and the plain one in blocks of
    rows, O(N² (K + D)), that never holds a matrix of N x N. If all rows of one side are identical
    its D is zero and each row counts 1, if those of both sides are, 0; the gradient is zero there.

    Args:
        student: Rows `[N, K]`, logits or features, the global and local ones of all images alike.
        teacher: Rows `[N, D]` of the same images and cells; receives no gradient.
        global_batch: Take the rows of all processes of the default process group together. Each
            process then holds the same value and, times the process count, its share of the
            gradient, so that data-parallel averaging gives exactly one process's gradient.

    Returns:
        A scalar in float32, or in float64 for float64 input. It can be differentiated once.

    Raises:
        ValueError: If the numbers of rows differ, or with `global_batch` the processes' do.

    Source: GLD (ICCV 2021), section 3, the densely connected relations; the linear form and rows of
    two widths are ours.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"relation takes rows [N, K] and [N, D], as many of each, got {list(student.shape)} "
            f"and {list(teacher.shape)}"
        )
    world_size = dist.get_world_size() if global_batch and is_distributed() else 1
    if world_size > 1:
        check_equal_rows(student)
    with torch.autocast(student.device.type, enabled=False):
        return _Relation.apply(student, teacher.detach(), world_size)


def working_dtype(rows: torch.Tensor) -> torch.dtype:
    """Return float64 for float64 rows, float32 for all others."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


class _Relation(torch.autograd.Function):
    """Value and gradient are worked out together: no graph and nothing N x N is kept."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, world_size: int
    ) -> torch.Tensor:
        dtype, rows = working_dtype(student), len(student) * world_size
        width = _equal_width(student.shape[1], teacher.shape[1])
        linear = student.device.type != "mps" and _linear_is_cheaper(rows, width)
        wide = torch.float64 if linear else dtype  # MPS has no float64
        (s, scale, s_flat), (t, _, t_flat) = (
            _centre(side, dtype, wide, world_size) for side in (student, teacher)
        )
        with_gradient = ctx.needs_input_grad[0]
        if linear:
            value, gradient = _linear(s, t, s_flat, t_flat, world_size, with_gradient)
        else:
            with _ieee_matmul():
                value, gradient = _plain(s, t, world_size, with_gradient)
        if gradient is not None:
            # not yet in the student's type: float16 holds it only once the loss scale is in it
            ctx.save_for_backward((gradient * (world_size / scale)).to(dtype))
            ctx.student_dtype = student.dtype
        return value.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.student_dtype), None, None


def _equal_width(width: int, other: int) -> float:
    """Return of which one width both forms would cost in the same proportion as of these two."""
    return 2 * (width**2 + width * other + other**2) / (3 * (width + other))


def _linear_is_cheaper(rows: int, width: float) -> bool:
    return rows > 6 * width  # measured on two CPU cores: benchmarks/relation.py


def _centre(
    side: torch.Tensor, dtype: torch.dtype, wide: torch.dtype, world_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return centred rows in `wide` with a largest entry of 1, their scale, and if all were equal.

    Distances do not change under a shift, and the relation not under a scale, so neither needs a
    gradient of its own; both keep the arithmetic that follows far from cancellation, overflow and
    underflow.
    """
    info = torch.finfo(dtype)
    mean = add_up(side.sum(0, dtype=wide), world_size) / (len(side) * world_size)
    centred = side.to(wide) - mean
    extremes = torch.stack([_largest(centred), _largest(side).to(wide)])
    if world_size > 1:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    spread, size = extremes.unbind()
    flat = spread <= 16 * info.eps * size + info.tiny**0.5
    scale = torch.where(flat, 1.0, spread)
    return centred.mul_(torch.where(flat, 0.0, 1 / scale)), scale, flat


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value."""
    low, high = x.aminmax()
    return torch.maximum(high, -low)


def _row_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the inner products of rows `[n]`, a block that stays in the cache at a time."""
    step = max(1, _BLOCK_ENTRIES // x.shape[1])
    parts = zip(x.split(step), y.split(step), strict=True)
    return torch.cat([(rows * others).sum(1) for rows, others in parts])


def _linear(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_flat: torch.Tensor,
    teacher_flat: torch.Tensor,
    world_size: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Evaluate `2/N² sum_r (1 - cos_r)`, cos_r between distance rows, from moments of rows.

    In float64 throughout: 1 - cos cancels.
    """
    ss, tt, ts = (
        _Pair(x, y, world_size)
        for x, y in ((student, student), (teacher, teacher), (teacher, student))
    )
    either = student_flat | teacher_flat
    student_sq, teacher_sq, mixed = (pair.row_products() for pair in (ss, tt, ts))
    norms = torch.where(either, 1.0, student_sq * teacher_sq).sqrt()
    cosine = torch.where(either, torch.where(student_flat & teacher_flat, 1.0, 0.5), mixed / norms)
    rows = len(student) * world_size
    value = add_up((1 - cosine.clamp(max=1)).sum(), world_size) * (2 / rows**2)
    if not with_gradient:
        return value, None
    # of -2/N² sum_r cos_r, through <D(t)_r, D(s)_r> and through |D(s)_r|², which holds s twice
    by_mixed = torch.where(either, 0.0, -2 / rows**2 / norms)
    by_student = torch.where(either, 0.0, 2 / rows**2 * cosine / student_sq)
    return value, ts.gradient(by_mixed).add_(ss.gradient(by_student))


class _Pair:
    """The sums `p_r = sum_c |x_r - x_c|² |y_r - y_c|²` of centred rows x and y, in linear time.

    With a = |x|², b = |y|² they are `N a b + a sum(b) + b sum(a) + sum(ab) - 2 x xᵀb - 2 y yᵀa +
    4 x (xᵀy) y`; the rows are centred, so the terms with sums of x or y vanish.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, world_size: int) -> None:
        self.x, self.y = x, y
        self.a, self.b = _row_dots(x, x), _row_dots(y, y)
        self.world_size = world_size
        scalars = torch.stack([self.a.sum(), self.b.sum(), self.a @ self.b])
        self.scalars, self.xb, self.ya, moment = self._reduce(
            scalars, self.b @ x, self.a @ y, x.T @ y
        )
        self.x_moment = x @ moment

    def row_products(self) -> torch.Tensor:
        """Return p `[n]` of this process's rows."""
        sum_a, sum_b, sum_ab = self.scalars.unbind()
        rows = len(self.x) * self.world_size
        return (
            rows * self.a * self.b
            + self.a * sum_b
            + self.b * sum_a
            + sum_ab
            - 2 * (self.x @ self.xb)
            - 2 * (self.y @ self.ya)
            + 4 * _row_dots(self.x_moment, self.y)
        )

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient `[n, K]` of `sum_r weight_r p_r` with respect to y alone, once."""
        x, y, a = self.x, self.y, self.a
        scalars = torch.stack([weight.sum(), weight @ a])
        (total, total_a), wx, wy, way, moment = self._reduce(
            scalars, weight @ x, weight @ y, (weight * a) @ y, x.T @ (weight[:, None] * y)
        )
        rows = len(x) * self.world_size
        by_b = weight * (rows * a + self.scalars[0]) + total_a + total * a - 2 * (x @ wx)
        gradient = self.x_moment.mul_(weight[:, None]).addmm_(x, moment).mul_(4)  # its last use
        gradient.addcmul_(by_b[:, None], y, value=2)
        gradient.addr_(weight, self.ya, alpha=-2).addr_(a, wy, alpha=-2)
        return gradient.sub_(way, alpha=2)  # through the sum of y, which is 0 and moves with it

    def _reduce(self, *sums: torch.Tensor) -> list[torch.Tensor]:
        """Add up what each process holds, in one message."""
        if self.world_size == 1:
            return list(sums)
        message = torch.cat([part.flatten() for part in sums])
        parts = add_up(message, self.world_size).split([part.numel() for part in sums])
        return [part.view_as(own) for part, own in zip(parts, sums, strict=True)]


def _plain(
    student: torch.Tensor, teacher: torch.Tensor, world_size: int, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Evaluate the definition for this process's rows against all, a block of rows at a time."""
    own, rank = len(student), dist.get_rank() if world_size > 1 else 0
    student, teacher = gather(student, world_size), gather(teacher, world_size)
    student_sq, teacher_sq = student.square().sum(1), teacher.square().sum(1)
    rows = len(student)
    total = student.new_zeros(())
    gradient = torch.zeros_like(student) if with_gradient else None
    for start in range(rank * own, (rank + 1) * own, step := max(1, _BLOCK_ENTRIES // rows)):
        part = slice(start, min(start + step, (rank + 1) * own))
        unit, norm = _unit_distances(student, student_sq, part)
        difference = unit - _unit_distances(teacher, teacher_sq, part)[0]
        total += difference.square().sum()
        if gradient is None:
            continue
        # through the division by the row norm, then through |x_r - x_c|², rows and columns
        inner = torch.linalg.vecdot(difference, unit)
        weight = difference.addcmul_(unit, inner[:, None], value=-1).div_(norm)
        if len(weight) == rows:  # one block: rows and columns at once
            weight = weight + weight.T
            gradient.addcmul_(student, weight.sum(0)[:, None]).addmm_(weight, student, alpha=-1)
            continue
        gradient.addcmul_(student, weight.sum(0)[:, None]).addmm_(weight.T, student[part], alpha=-1)
        gradient[part] += student[part] * weight.sum(1)[:, None] - weight @ student
    value = add_up(total, world_size) / rows**2
    if gradient is None:
        return value, None
    return value, add_up(gradient, world_size)[rank * own : (rank + 1) * own] * (4 / rows**2)


def _unit_distances(
    x: torch.Tensor, squares: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `part` of the squared distances over their norms, and the norms (1 for 0)."""
    distances = torch.addmm(squares, x[part], x.T, alpha=-2).add_(squares[part, None]).clamp_(min=0)
    distances.diagonal(part.start).zero_()
    norm = distances.norm(dim=1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    return distances.div_(norm), norm


@contextlib.contextmanager
def _ieee_matmul() -> Iterator[None]:
    """Multiply float32 matrices in float32: autocast off turns neither TF32 nor bfloat16 off.

    What compiles cannot see nor set that; there the user's setting holds.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        backends = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
