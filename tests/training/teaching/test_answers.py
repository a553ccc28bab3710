"""What is kept of a teacher's rows, and that they come back as they were."""

from types import SimpleNamespace

import pytest
import timm
import torch

from gld_zoo.distillation.maps import FeatureMap
from gld_zoo.distillation.teacher import Teacher
from gld_zoo.training.common.errors import StoreError
from gld_zoo.training.teaching.answers import Answers, choose_answers


def teacher_with(width, side, *, kind="own", affine=True):
    """What `choose_answers` asks of a teacher."""
    layout = FeatureMap(torch.empty(1, width, side, side, device="meta"), "NCHW")
    return SimpleNamespace(layout=layout, kind=kind, head_is_affine=lambda: affine)


@pytest.mark.parametrize(
    ("teacher", "grid", "classes", "expected"),
    [
        # the smaller of both, without the global row where the cells tile the map
        (teacher_with(64, 8), 2, 100, ("features", 4, 64, (0, 4))),
        (teacher_with(1280, 4), 2, 10, ("logits", 4, 10, (0, 4))),
        (teacher_with(1280, 7), 2, 10, ("logits", 4, 10, (0, 0))),
        (teacher_with(1280, 4, affine=False), 2, 10, ("logits", 4, 10, (0, 0))),
        (teacher_with(1280, 4, kind="none"), 2, 10, ("features", 4, 1280, (0, 4))),
        (teacher_with(64, 7), 2, 100, ("features", 4, 64, (0, 0))),
        (teacher_with(64, 8), (3, 4), 100, ("features", 25, 64, (9, 25))),
    ],
)
def test_the_smaller_of_features_and_logits_is_kept(teacher, grid, classes, expected):
    answers = choose_answers(teacher, grid, classes, "float16")
    span = answers.first, answers.end
    assert (answers.what, answers.cells, answers.width, span) == expected
    kept = answers.encode(torch.randn(3, 1 + answers.cells, answers.width))
    assert kept.shape == (3, *answers.shape)
    assert not choose_answers(teacher, grid, classes, "float32").leaves_global_out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("span", [(0, 0), (0, 4)])
def test_rows_come_back_as_they_were(dtype, span):
    answers = Answers("logits", 4, 7, dtype, *span)
    cells = torch.randn(5, 4, 7)
    rows = torch.cat([cells.mean(1, keepdim=True), cells], dim=1)
    back = answers.decode(answers.encode(rows))
    assert back.dtype == torch.float32
    # float16 keeps 11 bits
    tolerance = dict(float16=2**-10, float32=1e-6)[dtype]
    torch.testing.assert_close(back, rows, rtol=tolerance, atol=tolerance)
    again = answers.decode(answers.encode(back[:, :]))
    assert torch.equal(again, back)  # what has been kept once is kept to the bit


def test_numbers_that_float16_does_not_hold_are_refused():
    answers = Answers("features", 1, 2, "float16")
    with pytest.raises(StoreError, match=r"reach 1e\+05.*store_dtype: float32"):
        answers.encode(torch.full((1, 2, 2), 1e5))


def test_what_is_kept_is_a_copy():
    rows = torch.zeros(1, 5, 3)
    kept = Answers("logits", 4, 3, "float32").encode(rows)
    rows += 1
    assert not kept.any()


@pytest.mark.parametrize(
    ("name", "affine"), [("gld_resnet20", True), ("mobilenetv3_small_100", False)]
)
def test_a_head_is_known_to_be_affine(name, affine):
    model = timm.create_model(name, num_classes=5).eval()
    for parameter in model.get_classifier().parameters():
        torch.nn.init.normal_(parameter)
    teacher = Teacher(model, 2, (0.5,) * 3, (0.5,) * 3)
    teacher(torch.randn(1, 3, 64, 64))
    assert teacher.head_is_affine() is affine
