"""The loss against the paper's equations in float64, and its promises at the edges."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gld_zoo import GLDLoss, logit_kl, relation
from gld_zoo.distillation import relations
from gld_zoo.distillation.losses import RelationLoss

FORMS = pytest.mark.parametrize("linear", [True, False], ids=["linear", "plain"])


@pytest.fixture
def use_form(monkeypatch):
    def choose(linear, block_entries=None):
        monkeypatch.setattr(relations, "_linear_is_cheaper", lambda rows, classes: linear)
        if block_entries:
            monkeypatch.setattr(relations, "_BLOCK_ENTRIES", block_entries)

    return choose


def reference_relation(student, teacher):
    def normalised(z):
        distances = (z[:, None] - z[None]).square().sum(-1)
        return distances / distances.norm(dim=1, keepdim=True)

    return (normalised(teacher) - normalised(student)).square().sum() / len(student) ** 2


def reference_terms(student, teacher, target, alpha, beta):
    def kl(t, s):
        p = (t / t.std(-1, keepdim=True)).softmax(-1)
        q = (s / s.std(-1, keepdim=True)).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    ce = -student[:, 0].log_softmax(-1)[torch.arange(len(target)), target].mean()
    return dict(
        loss_ce=(1 - alpha) * ce,
        loss_global=alpha * kl(teacher[:, 0], student[:, 0]),
        loss_local=sum(kl(teacher[:, i], student[:, i]) for i in range(1, student.shape[1])),
        loss_relation=beta * reference_relation(student.flatten(0, 1), teacher.flatten(0, 1)),
    )


def logits(batch=6, grid=2, classes=10, dtype=torch.float64):
    shape = (batch, 1 + grid**2, classes)
    student = torch.randn(shape, dtype=dtype).requires_grad_()
    return student, 3 * torch.randn(shape, dtype=dtype) + 1, torch.randint(classes, (batch,))


@FORMS
@pytest.mark.parametrize(
    ("batch", "grid", "classes"), [(6, 2, 10), (3, 4, 20), (2, 1, 5), (16, 3, 7)]
)
def test_terms_and_gradients_equal_the_papers_equations(use_form, linear, batch, grid, classes):
    use_form(linear, block_entries=50)  # several blocks, the last one incomplete
    student, teacher, target = logits(batch, grid, classes)
    terms = GLDLoss(alpha=0.6, beta=40.0)(student, teacher, target)
    (gradient,) = torch.autograd.grad(terms["loss"], student)
    expected = reference_terms(student, teacher, target, 0.6, 40.0)
    (expected_gradient,) = torch.autograd.grad(sum(expected.values()), student)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["loss"], sum(expected.values()), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@FORMS
def test_relation_passes_gradcheck(use_form, linear):
    use_form(linear, block_entries=30)
    student = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher), student)


@FORMS
@pytest.mark.parametrize("distance", [1.0, 0.05, 0.005])
def test_float32_keeps_its_precision_close_to_the_teacher(use_form, linear, distance):
    use_form(linear)
    teacher = torch.randn(80, 20, dtype=torch.float64).float()
    student = (teacher + distance * torch.randn(80, 20)).requires_grad_()
    value = relation(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    exact = student.detach().double().requires_grad_()
    expected = reference_relation(exact, teacher.double())
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert value.dtype == torch.float32
    # the linear form runs in float64; the plain one rounds distances, 1e-7, over their difference
    tolerance = 1e-6 if linear else 1e-6 / distance
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    assert (gradient - expected_gradient).abs().max() < tolerance * expected_gradient.abs().max()


@FORMS
def test_relation_is_zero_at_the_teacher_and_ignores_scale_shift_and_order(use_form, linear):
    use_form(linear)
    student, teacher = torch.randn(2, 40, 10, dtype=torch.float64)
    assert 0 <= relation(3 * teacher + 2, teacher) < 1e-14
    order = torch.randperm(40)
    value = relation(student, teacher)
    torch.testing.assert_close(
        relation(7 * student[order] - 5, teacher[order]), value, rtol=1e-12, atol=0
    )


def edge_cases():
    row = torch.randn(1, 1, 10)
    plain = torch.randn(4, 5, 10)
    return {
        "constant rows": (torch.full((4, 5, 10), 3.0), plain),
        "constant large rows": (torch.full((4, 5, 10), 9999.9), plain),
        "constant teacher": (plain, torch.full((4, 5, 10), -1e4)),
        "both constant": (torch.ones(4, 5, 10), torch.zeros(4, 5, 10)),
        "identical rows": (row.expand(4, 5, 10).clone(), plain),
        "identical large rows": (1e4 * row.expand(4, 5, 10).clone(), plain),
        "identical teacher rows": (plain, row.expand(4, 5, 10).clone()),
        "equal": (plain, plain),
        "one image": (plain[:1], plain[1:2]),
        "large": (1e4 * plain, 1e4 * plain.flip(0)),
        "tiny": (1e-12 * plain, plain.flip(0)),
        "denormal": (1e-40 * plain, plain.flip(0)),
        "one outlier": (torch.cat([1e4 * plain[:1], 1e-4 * plain[1:]]), plain),
        "two classes": (plain[..., :2], plain.flip(0)[..., :2]),
        "one class": (plain[..., :1], plain.flip(0)[..., :1]),
    }


@FORMS
@pytest.mark.parametrize("name", edge_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_logits_give_a_finite_loss_and_gradient(use_form, linear, name, dtype):
    use_form(linear)
    student, teacher = (value.to(dtype) for value in edge_cases()[name])
    if not (student.isfinite().all() and teacher.isfinite().all()):
        pytest.skip(f"{name} logits do not exist in {dtype}")
    student.requires_grad_()
    terms = GLDLoss()(student, teacher, torch.zeros(len(student), dtype=torch.int64))
    terms["loss"].backward()
    for term, value in terms.items():
        assert value.isfinite(), f"{term} is {value}"
        assert value >= (0 if term == "loss_relation" else -1e-6), f"{term} is {value}"
    assert student.grad.isfinite().all()


@FORMS
def test_identical_rows_count_one_a_row_and_pass_no_gradient(use_form, linear):
    use_form(linear)
    flat = torch.full((12, 5), 0.1, requires_grad=True)
    spread = torch.randn(12, 5)
    value = relation(flat, spread)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(1 / 12))  # 1/N² times N rows of norm 1
    assert not flat.grad.any()
    torch.testing.assert_close(relation(spread, flat.detach()), torch.tensor(1 / 12))
    assert relation(flat, flat.detach() + 3) == 0


def test_both_forms_agree_where_the_choice_changes():
    rows = next(n for n in range(2, 10_000) if relations._linear_is_cheaper(n, 10))
    student, teacher = torch.randn(2, rows, 10, dtype=torch.float64)
    torch.testing.assert_close(
        relation(student, teacher), reference_relation(student, teacher), rtol=1e-10, atol=0
    )
    less = relation(student[1:], teacher[1:])
    torch.testing.assert_close(
        less, reference_relation(student[1:], teacher[1:]), rtol=1e-10, atol=0
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_plain_form_keeps_no_matrix_of_all_rows(use_form):
    use_form(False, block_entries=4000)
    student = torch.randn(400, 5, requires_grad=True)
    with LargestTensor() as largest:
        relation(student, torch.randn(400, 5)).backward()
    assert 0 < largest.numel <= 4000


@FORMS
def test_autocast_does_not_move_the_loss(use_form, linear):
    use_form(linear)
    student, teacher, target = logits(dtype=torch.float32)
    criterion = GLDLoss()
    plain = criterion(student, teacher, target)
    with torch.autocast("cpu", torch.bfloat16):
        cast = criterion(student, teacher, target)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name
        assert cast[name].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["cuda.matmul.fp32_precision", "legacy"])
def test_plain_form_multiplies_in_float32_whatever_the_user_set(setting):
    code = (
        "import torch\n"
        f"new = {setting!r} != 'legacy'\n"
        "if new and not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):\n"
        "    raise SystemExit\n"
        "student, teacher = torch.randn(2, 1024, 1000)  # of fewer oneDNN keeps float32\n"
        "from gld_zoo import relation\n"
        "from gld_zoo.distillation import relations\n"
        "relations._linear_is_cheaper = lambda rows, classes: False\n"
        "expected = relation(student, teacher)\n"
        "if new:\n"
        "    torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "    torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "else:\n"
        "    torch.set_float32_matmul_precision('medium')\n"
        "assert torch.equal(relation(student, teacher), expected)\n"
        "if new:\n"
        "    assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
        "else:\n"
        "    assert torch.get_float32_matmul_precision() == 'medium'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher, target = logits(dtype=torch.float32)
    half = [student.bfloat16(), teacher.bfloat16()]
    expected = GLDLoss()(half[0].float(), half[1].float(), target)["loss"]
    assert torch.equal(GLDLoss()(*half, target)["loss"], expected)


@pytest.mark.parametrize(
    ("options", "off"),
    [
        (dict(alpha=0.0), "loss_global"),
        (dict(alpha=1.0), "loss_ce"),
        (dict(local_weight=0.0), "loss_local"),
        (dict(beta=0.0), "loss_relation"),
    ],
)
def test_each_weight_turns_its_term_off(options, off):
    student, teacher, target = logits()
    terms = GLDLoss(**options)(student, teacher, target)
    assert terms[off] == 0
    assert all(terms[name] > 0 for name in terms if name != off)
    torch.testing.assert_close(terms["loss"], sum(terms[name] for name in terms if name != "loss"))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_get_the_relations_gradient(use_form, linear, dtype):
    """It is rounded once, with the loss scale in it: by itself it is below what float16 holds."""
    use_form(linear)
    student, teacher = torch.randn(2, 320, 20).to(dtype)
    wide = student.float().requires_grad_()
    (2.0**10 * relation(wide, teacher.float())).backward()
    student.requires_grad_()
    (2.0**10 * relation(student, teacher)).backward()
    assert torch.equal(student.grad, wide.grad.to(dtype))
    assert (student.grad != 0).double().mean() > 0.95


def test_a_row_is_at_no_distance_from_itself():
    rows = 1e3 + torch.randn(50, 10)  # whose squares cancel
    unit, _ = relations._unit_distances(rows, rows.square().sum(1), slice(10, 30))
    assert unit.shape == (20, 50)
    assert (unit[range(20), range(10, 30)] == 0).all()
    assert ((unit > 0).sum(1) >= 45).all()


@pytest.mark.parametrize("level", [0.1, 5.0, 1e4])
def test_a_constant_row_stands_for_the_uniform_distribution(level):
    teacher = torch.randn(1, 10)
    constant = torch.full((1, 10), level, requires_grad=True)
    p = (teacher / teacher.std()).softmax(-1)
    value = logit_kl(constant, teacher)
    torch.testing.assert_close(value, (p * (10 * p).log()).sum(-1))
    value.backward()
    assert constant.grad.abs().max() < 1
    torch.testing.assert_close(
        logit_kl(teacher, constant.detach()), -(10 * p).log().mean(-1), rtol=1e-5, atol=1e-6
    )


def test_the_loss_compiles_whole():
    student, teacher, target = logits(dtype=torch.float32)
    expected = GLDLoss()(student, teacher, target)["loss"]
    expected.backward()
    gradient, student.grad = student.grad, None
    found = torch.compile(GLDLoss(), fullgraph=True, backend="eager")(student, teacher, target)
    torch.testing.assert_close(found["loss"], expected)
    found["loss"].backward()
    torch.testing.assert_close(student.grad, gradient)


def test_teacher_receives_no_gradient():
    student, teacher, target = logits()
    teacher.requires_grad_()
    GLDLoss()(student, teacher, target)["loss"].backward()
    assert teacher.grad is None


def test_logit_kl_ignores_the_scale_of_each_row():
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    scale = torch.rand(8, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(logit_kl(scale * student + 2, teacher), logit_kl(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logit_kl_computes_half_precision_in_float32(dtype):
    student, teacher = 300 * torch.randn(2, 4, 10)
    value = logit_kl(student.to(dtype), teacher.to(dtype))
    expected = logit_kl(student.to(dtype).float(), teacher.to(dtype).float())
    assert torch.equal(value, expected)


def test_cross_entropy_is_the_global_rows():
    student, teacher, target = logits()
    terms = GLDLoss(alpha=0.0)(student, teacher, target)
    torch.testing.assert_close(terms["loss_ce"], F.cross_entropy(student[:, 0], target))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 10), (4, 10), (4,)), r"\[B, 1\+L, K\]"),
        (((4, 1, 10), (4, 1, 10), (4,)), r"L and K at least 1, got \[4, 1, 10\]"),
        (((0, 5, 10), (0, 5, 10), (0,)), r"at least 1, got \[0, 5, 10\]"),
        (((4, 5, 10), (4, 5, 9), (4,)), "same classes"),
        (((4, 5, 10), (4, 10, 10), (4,)), "same grid"),
        (((4, 5, 10), (4, 5, 10), (5,)), r"class index an image, \[4\].*got \[5\]"),
        (((4, 5, 10), (4, 5, 10), (4, 9)), r"probabilities, \[4, 10\], got \[4, 9\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    student, teacher, target = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        GLDLoss()(student, teacher, target)


@FORMS
@pytest.mark.parametrize(("width", "other"), [(7, 3), (3, 11), (5, 1)])
def test_relation_of_two_widths_against_its_definition(use_form, linear, width, other):
    use_form(linear, block_entries=64)
    student = torch.randn(12, width, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(12, other, dtype=torch.float64) + 1
    ours, expected = relation(student, teacher), reference_relation(student, teacher)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher), student)


@FORMS
def test_relation_of_two_widths_is_zero_where_the_distances_are_the_same(use_form, linear):
    use_form(linear)
    student = torch.randn(20, 4, dtype=torch.float64)
    into, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))  # 9 orthonormal dimensions
    assert relation(student, 5 * student @ into.T + 2).item() == pytest.approx(0, abs=1e-15)


def test_the_linear_form_is_chosen_by_both_widths():
    assert relations._equal_width(64, 64) == 64
    assert 512 < relations._equal_width(512, 1280) < 1280


def test_relation_loss_is_its_relation_and_cross_entropy():
    student = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, 9, dtype=torch.float64)
    head = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (6,))
    terms = RelationLoss(20.0, ce_weight=0.5)(student, teacher, head, target)
    assert set(terms) == {"loss", "loss_ce", "loss_relation"}
    expected = 20 * reference_relation(student.flatten(0, 1), teacher.flatten(0, 1))
    entropy = -head.log_softmax(-1)[torch.arange(6), target].mean() / 2
    torch.testing.assert_close(terms["loss_relation"], expected)
    torch.testing.assert_close(terms["loss_ce"], entropy)
    torch.testing.assert_close(terms["loss"], expected + entropy)
    alone = RelationLoss(20.0)(student, teacher)
    assert set(alone) == {"loss", "loss_relation"}
    torch.testing.assert_close(alone["loss"], expected)


@pytest.mark.parametrize("options", [dict(beta=-1.0), dict(ce_weight=float("inf"))])
def test_relation_loss_refuses_weights_out_of_range(options):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        RelationLoss(**options)


def test_relation_loss_refuses_rows_of_different_cells():
    with pytest.raises(ValueError, match="both models need the same grid"):
        RelationLoss()(torch.randn(2, 5, 4), torch.randn(2, 17, 4))


def test_relation_refuses_different_shapes():
    with pytest.raises(ValueError, match="as many of each"):
        relation(torch.zeros(4, 3), torch.zeros(5, 3))


@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=1.5),
        dict(alpha=-0.1),
        dict(beta=-1.0),
        dict(beta=float("inf")),
        dict(local_weight=-1.0),
    ],
)
def test_weights_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GLDLoss(**options)


def cross_entropy(student, target):
    return -student[:, 0].log_softmax(-1)[torch.arange(len(target)), target].mean()


def soft_kl(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def hinton(student, teacher, target):
    """Hinton et al., 2015: soft targets at T = 4 and the labels."""
    kd = soft_kl(student[:, 0], teacher[:, 0], 4).mean()
    return dict(loss_ce=0.1 * cross_entropy(student, target), loss_global=0.9 * kd)


def logit_standardisation(student, teacher, target):
    """Sun et al., CVPR 2024: soft targets of z-scores at T = 2."""

    def z_score(z):
        return (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)

    kd = soft_kl(z_score(student[:, 0]), z_score(teacher[:, 0]), 2).mean()
    return dict(loss_ce=0.1 * cross_entropy(student, target), loss_global=9 * kd)


def scale_decoupled(student, teacher, target):
    """Wei et al., CVPR 2024: the mean over all rows, those in twofold that complete the global."""
    right = teacher.argmax(-1) == target[:, None]
    each = soft_kl(student, teacher, 4) * torch.where(right ^ right[:, :1], 2, 1)
    shares = 0.9 * each.sum(0) / each.numel()
    ce = 0.1 * cross_entropy(student, target)
    return dict(loss_ce=ce, loss_global=shares[0], loss_local=shares[1:].sum())


MEMBERS = {
    hinton: dict(alpha=0.9, standardise=False, temperature=4, local_weight=0),
    logit_standardisation: dict(temperature=2, ce_weight=0.1, global_weight=9, local_weight=0),
    scale_decoupled: dict(
        standardise=False,
        temperature=4,
        disagreement=2,
        ce_weight=0.1,
        global_weight=0.9 / 21,
        local_weight=0.9 / 21,
    ),
}


def answered_logits(batch=8, classes=10):
    """Rows of grids 2 and 4 of a teacher that is right in about half of them."""
    student, teacher = torch.randn(2, batch, 21, classes, dtype=torch.float64)
    target = torch.randint(classes, (batch,))
    answers = torch.where(
        torch.rand(batch, 21) < 0.5, target[:, None], (target[:, None] + 3) % classes
    )
    teacher += 9 * F.one_hot(answers, classes)
    right = teacher.argmax(-1) == target[:, None]
    cases = {(bool(whole[0]), bool(cell)) for whole in right for cell in whole[1:]}
    assert len(cases) == 4  # both, neither, and either alone
    return student.requires_grad_(), teacher, target


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_members_of_the_family_equal_their_papers_equations(member):
    student, teacher, target = answered_logits()
    terms = GLDLoss(beta=0, **MEMBERS[member])(student, teacher, target)
    (gradient,) = torch.autograd.grad(terms["loss"], student)
    expected = member(student, teacher, target)
    (expected_gradient,) = torch.autograd.grad(sum(expected.values()), student)
    for name in ("loss_ce", "loss_global", "loss_local", "loss_relation"):
        value = expected.get(name, torch.zeros_like(terms[name]))
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["loss"], sum(expected.values()), rtol=1e-10, atol=0)
    # the absolute one for differences of probabilities that cancel
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("standardise", [True, False])
def test_disagreement_weighs_only_cells_that_contradict_the_global_answer(standardise):
    student, teacher, target = answered_logits()
    options = dict(standardise=standardise, beta=0)
    plain, heavy, none = (
        GLDLoss(disagreement=weight, **options)(student, teacher, target) for weight in (1, 2, 0)
    )
    torch.testing.assert_close(2 * plain["loss_local"], heavy["loss_local"] + none["loss_local"])
    assert none["loss_local"] < plain["loss_local"] < heavy["loss_local"]
    assert torch.equal(plain["loss_global"], heavy["loss_global"])
    teacher[:, 1:] = teacher[:, :1]
    always, never = (
        GLDLoss(disagreement=weight, **options)(student, teacher, target) for weight in (1, 0)
    )
    assert torch.equal(always["loss"], never["loss"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_defaults_are_the_papers_to_the_bit(dtype):
    student, teacher, target = logits(dtype=torch.float32)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    written = dict(temperature=1, standardise=True, disagreement=1)
    written.update(ce_weight=1 - 0.7, global_weight=0.7)
    found = []
    for criterion in (GLDLoss(), GLDLoss(**written)):
        terms = criterion(student, teacher, target)
        found.append([*terms.values(), *torch.autograd.grad(terms["loss"], student)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("standardise", [True, False])
def test_each_divergence_passes_gradcheck_and_is_zero_at_the_teacher(temperature, standardise):
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    options = dict(temperature=temperature, standardise=standardise)
    assert torch.autograd.gradcheck(lambda s: logit_kl(s, teacher, **options), student)
    assert not logit_kl(teacher, teacher, **options).any()
    assert (logit_kl(student, teacher, **options) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_labels_may_be_probabilities(dtype):
    student, teacher, target = logits(dtype=dtype)
    expected = GLDLoss()(student, teacher, target)
    (gradient,) = torch.autograd.grad(expected["loss"], student)
    terms = GLDLoss()(student, teacher, F.one_hot(target, 10).to(expected["loss"].dtype))
    for name, value in expected.items():  # sums of the same numbers in another order
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(torch.autograd.grad(terms["loss"], student)[0], gradient)


def test_mixed_labels_cost_the_mix_of_both_cross_entropies():
    student, teacher, target = logits()
    other = target.roll(3)
    mixed = 0.3 * F.one_hot(target, 10).double() + 0.7 * F.one_hot(other, 10).double()
    first, second, both = (GLDLoss()(student, teacher, labels) for labels in (target, other, mixed))
    expected = 0.3 * first["loss_ce"] + 0.7 * second["loss_ce"]
    torch.testing.assert_close(both["loss_ce"], expected, rtol=1e-12, atol=0)
    for name in ("loss_global", "loss_local", "loss_relation"):
        assert torch.equal(both[name], first[name])


def test_disagreement_needs_labels_that_are_right_or_wrong():
    student, teacher, target = logits()
    with pytest.raises(ValueError, match=r"disagreement=2 .* indices \[B\], got \[6, 10\]"):
        GLDLoss(disagreement=2)(student, teacher, F.one_hot(target, 10).double())


@pytest.mark.parametrize("name", edge_cases())
@pytest.mark.parametrize("options", [dict(standardise=False, temperature=4), dict(temperature=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_logits_give_a_finite_divergence_at_every_temperature(name, options, dtype):
    student, teacher = (value.to(dtype) for value in edge_cases()[name])
    if not (student.isfinite().all() and teacher.isfinite().all()):
        pytest.skip(f"{name} logits do not exist in {dtype}")
    student.requires_grad_()
    target = torch.zeros(len(student), dtype=torch.int64)
    terms = GLDLoss(disagreement=2, **options)(student, teacher, target)
    terms["loss"].backward()
    for term, value in terms.items():
        assert value.isfinite(), f"{term} is {value}"
        assert value.dtype == torch.float32
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ce_weight", "global_weight", "disagreement", "temperature"])
@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_options_of_the_family_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must "):
        GLDLoss(**{name: value})


def test_a_temperature_of_0_is_refused():
    with pytest.raises(ValueError, match=r"temperature=0 must lie between 0\.001"):
        GLDLoss(temperature=0)
