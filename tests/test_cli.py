"""The command, on real images of many formats; bad ones are named and skipped."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from gld_zoo import create_deeplabv3plus, global_local_logits, recipes
from gld_zoo.cli import TRAINING_COMMANDS, main
from gld_zoo.downstream.saving import save_downstream
from gld_zoo.explain import HEAD, SIDE, explain, seen_part
from gld_zoo.fonts import drawable
from gld_zoo.hub import save_pretrained
from gld_zoo.images import find_images, read_image
from gld_zoo.predictor import Predictor, class_names
from gld_zoo.results import Results
from gld_zoo.training.commands import draw
from gld_zoo.training.data.rows import ImageRows

FORMATS = ["png", "jpg", "webp", "bmp", "gif", "tif"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, rows):
    """Real images of several formats, modes and sizes; the first class is apples."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, suffix in enumerate(FORMATS):
        image = Image.open(io.BytesIO(rows["test"]["img"][i]["bytes"])).convert("RGB")
        image.resize((40 + 20 * i, 90 - 10 * i)).save(folder / f"{i}.{suffix}")
    first = Image.open(folder / "0.png")
    (folder / "deep").mkdir()
    first.convert("RGBA").save(folder / "deep" / "alpha.png")
    first.convert("L").save(folder / "deep" / "grey.png")
    first.convert("CMYK").save(folder / "deep" / "cmyk.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    if code == "error":
        assert str(stop.value.code).startswith("error: ")
        return str(stop.value.code)
    assert stop.value.code == code, printed
    return printed.out if code == 0 else printed.out + printed.err


def test_predictions_are_the_models_own(pictures, capsys):
    output = run(capsys, "predict", pictures, "--top", 2, "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    assert len(lines) == len(FORMATS) + 3
    model = timm.create_model("gld_wrn16_1", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = class_names(model, "gld_wrn16_1")
    assert (names[0], names[99]) == ("apple", "worm")
    for line in lines:
        with torch.no_grad():
            p = model(transform(read_image(line["image"]))[None]).softmax(1)[0].topk(2)
        assert [found["label"] for found in line["classes"]] == [names[i] for i in p.indices]
        for found, value in zip(line["classes"], p.values.tolist(), strict=True):
            assert found["probability"] == pytest.approx(value, abs=1e-5)


def test_names_of_imagenets_classes_are_timms():
    model = timm.create_model("resnet18")
    for name in ("resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"):
        names = class_names(model, name)
        assert names[207] == "golden retriever"
        assert len(set(names)) == 1000
        assert [name for name in names if name.startswith("crane")] == [names[134], names[517]]
    for name in ("local-dir:photos", "hf-hub:someone/photos", "runs/photos-0"):
        assert class_names(model, name)[207] == "class 207"
    model = timm.create_model("resnet18", num_classes=7)
    assert class_names(model, "resnet18")[3] == "class 3"


def test_a_run_folder_is_a_model(pictures, student_run, tmp_path, capsys):
    """The newcomer's next step after a run: no path within it to know of."""
    picture = pictures / "0.png"
    by_folder, by_path = (
        run(capsys, "predict", picture, "--model", name)
        for name in (student_run, f"local-dir:{student_run}/last")
    )
    assert by_folder == by_path
    run(capsys, "explain", picture, "--model", student_run, "-o", tmp_path / "x.png")
    (tmp_path / "recipe.yaml").write_text("student: gld_resnet20\n")
    message = run(capsys, "predict", picture, "--model", tmp_path, code="error")
    assert "holds no finished run; go on with it by --resume" in message
    of_folder = run(capsys, "predict", picture, "--model", student_run / "last")
    assert of_folder == by_path
    message = run(capsys, "predict", picture, "--model", tmp_path / "typo", code="error")
    assert f"there is no run and no model in the folder {tmp_path / 'typo'}" in message


def test_the_hub_out_of_reach_is_told_with_what_to_do(pictures, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "hf-hub:nobody/has-this"
    message = run(capsys, "predict", pictures / "0.png", "--model", name, code="error")
    assert f"{name!r} cannot be created: " in message
    assert "name a model's folder instead; HF_HUB_OFFLINE=1" in message


def test_a_bad_file_is_named_and_the_others_are_done(pictures, capsys):
    wanted = [pictures / "notes.txt", pictures / "none.png", pictures / "*.png"]
    output = run(capsys, "predict", *wanted, "--top", 1, code=1)
    assert "notes.txt: skipped, cannot identify image file" in output
    assert "none.png: skipped, [Errno 2] No such file" in output
    assert f"{pictures / '0.png'}: " in output
    assert output.count("%") == 1


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), TypeError("exif")])
def test_whatever_a_damaged_file_raises_is_named(pictures, error, monkeypatch, capsys):
    def fail(image):
        raise error

    monkeypatch.setattr("gld_zoo.images.to_rgb", fail)
    output = run(capsys, "predict", pictures / "0.png", code=1)
    assert f"0.png: skipped, {error}" in output
    message = run(capsys, "explain", pictures / "0.png", "-o", "x.png", code="error")
    assert f"0.png: {error}" in message


def test_a_link_that_leads_nowhere_is_named(tmp_path, capsys):
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "gone.png")
    for wanted in (link, tmp_path / "*.png"):
        assert "link.png: skipped, [Errno 2] No such file" in run(capsys, "predict", wanted, code=1)


def test_nothing_to_do_and_unknown_models_are_errors(pictures, tmp_path, capsys):
    assert "no image in" in run(capsys, "predict", tmp_path, code="error")
    message = run(capsys, "predict", pictures, "--model", "gld_resnet44", code="error")
    assert "--model 'gld_resnet44' cannot be created: No pretrained weights" in message
    message = run(capsys, "info", "resnet18", code="error")
    assert "is neither a model of this zoo nor a recipe; it holds gld_resnet" in message
    message = run(capsys, "info", "gld_wrn16_1.nope", code="error")
    assert "'gld_wrn16_1.nope' is not on record; gld_wrn16_1 has gld_wrn16_1." in message


@pytest.mark.parametrize(
    ("options", "words"), [(dict(num_classes=0), "0 classes"), (dict(in_chans=1), "1 channels")]
)
def test_models_that_do_not_classify_colour_images_are_refused(tmp_path, options, words, capsys):
    save_pretrained(timm.create_model("gld_resnet20", **options), tmp_path)
    message = run(capsys, "predict", tmp_path, "--model", f"local-dir:{tmp_path}", code="error")
    assert words in message
    assert "name a classifier of colour images" in message


def test_pixels_survive_every_mode(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    for mode, expected in [
        ("RGB", (200, 100, 50)),
        ("RGBA", (200, 100, 50)),
        ("P", (200, 100, 50)),
        ("L", (124, 124, 124)),
    ]:
        converted = colour.convert(mode, palette=Image.Palette.ADAPTIVE)
        converted.save(tmp_path / "x.png")
        found = read_image(tmp_path / "x.png").getpixel((3, 3))
        assert all(abs(a - b) <= 3 for a, b in zip(found, expected, strict=True)), mode
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (8, 8), 32896).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="it holds floats; convert it"):
        read_image(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 40_000, np.int32)).save(tmp_path / "deep.tif")
    assert read_image(tmp_path / "deep.tif").getpixel((0, 0)) == (155, 155, 155)


def test_the_trainers_read_the_same_pixels(tmp_path):
    """A model must see in use what it saw in training."""
    rows = ImageRows(table=None, image_column="image", where="here")
    image = Image.new("LA", (8, 8), (90, 128))
    image.putpixel((3, 3), (200, 0))
    image.save(tmp_path / "x.png")
    encoded = dict(bytes=(tmp_path / "x.png").read_bytes(), path=None)
    assert rows.read(encoded, "x").tobytes() == read_image(tmp_path / "x.png").tobytes()


def test_only_pictures_are_looked_for_in_folders(tmp_path):
    for name in ("a.pdf", "b.PNG", "c.txt", "._b.png", "d.eps", "__MACOSX/b.png", ".trash/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_images([str(tmp_path)])] == ["b.PNG"]
    found = find_images([str(tmp_path.parent / f"{tmp_path.name[:-1]}?"), "x" * 300])
    assert [path.name for path in found] == ["b.PNG", "x" * 300]


def test_names_of_a_saved_model_are_its_own(tmp_path, pictures, capsys):
    model = timm.create_model("gld_wrn16_1", num_classes=3)
    save_pretrained(model, tmp_path, label_names=["ant", "bee", "cat"])
    model = f"local-dir:{tmp_path}"
    output = run(capsys, "predict", pictures / "0.png", "--model", model)
    assert all(f"{name} " in output for name in ("ant", "bee", "cat"))


def test_list_and_info_tell_the_results(capsys):
    table = run(capsys, "list")
    resnet44 = sum(weight.numel() for weight in timm.create_model("gld_resnet44").parameters())
    assert f"gld_resnet44    {resnet44:>12,}  32     -" in table
    assert "wrn16_2_cifar100 (" in table
    assert "\nphotos, photos_teacher\n" in table
    named = table.partition("recipes")[2].replace("\n", " ").replace(",", " ").split()
    assert set(recipes.names()) <= set(named)
    info = run(capsys, "info", "gld_wrn16_1")
    assert "gld_wrn16_1.ce_cifar100: top-1" in info
    row = Results.load().weights["gld_wrn16_1.wrn16_2_cifar100"]
    assert (
        f"recipe {row.recipe}, changes {row.told_changes()}\n    seed 0, on {row.hardware}" in info
    )
    assert "teacher gld_wrn16_2.ce_cifar100" in info
    assert "no weights ship" in run(capsys, "info", "gld_resnet44")
    recorded = run(capsys, "info", "gld_resnet20.plus_alone_cifar100")
    assert "its weights do not ship" in recorded
    assert "pixels" not in recorded  # of the architecture without weights, not of this run
    assert "pixels (3, 64, 64)" in run(capsys, "info", "gld_resnet18")
    teacher = Results.load().weights["gld_resnet18.gldplus_cifar100"].teacher.name
    assert f"{teacher}: top-1 79.54 %" in run(capsys, "info", teacher)  # a model of timm's


def test_explain_draws_the_cells_and_the_map(pictures, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert f"{2 * SIDE} x" in run(capsys, "explain", pictures / "1.jpg", "-o", out)
    with Image.open(out) as picture:
        assert picture.width == 2 * SIDE
    message = run(capsys, "explain", pictures / "notes.txt", "-o", out, code="error")
    assert "cannot identify image file" in message
    nowhere = tmp_path / "no" / "x.png"
    message = run(capsys, "explain", pictures / "1.jpg", "-o", nowhere, code="error")
    assert "cannot write" in message
    message = run(capsys, "explain", pictures / "1.jpg", "-o", out, "--grid", 9, code="error")
    assert "grid=9 needs a feature map" in message
    drawn = out.read_bytes()
    message = run(capsys, "explain", out, "-o", tmp_path / "." / "out.png", code="error")
    assert "out.png is the image itself; name another file" in message
    assert out.read_bytes() == drawn


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", dict(img_size=64, depth=2, global_pool="avg"), None),
        ("mambaout_femto", {}, None),  # channels last
        ("vit_tiny_patch16_224", dict(img_size=64, depth=2), "classifies its class token"),
    ],
)
def test_explain_takes_every_form_of_map(pictures, tmp_path, capsys, name, options, message):
    model = save_pretrained(timm.create_model(name, num_classes=3, **options), tmp_path / "model")
    out = tmp_path / "out.png"
    command = ["explain", pictures / "1.jpg", "-o", out, "--model", f"local-dir:{model}"]
    if message:
        assert message in run(capsys, *command, code="error")
    else:
        assert "pixels" in run(capsys, *command)


@pytest.mark.parametrize("size", [(1000, 500), (450, 800)])
@pytest.mark.parametrize(
    ("mode", "crop_pct"), [("center", 0.875), ("center", 1.0), ("squash", 0.8)]
)
def test_the_picture_is_what_the_transform_keeps(size, mode, crop_pct):
    """Of a horizontal and a vertical gradient, the corners agree."""
    config = dict(input_size=(3, 64, 64), crop_pct=crop_pct, crop_mode=mode)
    axes = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([*axes, axes[0]], axis=-1).astype(np.uint8))
    options = dict(config, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    expected = timm.data.create_transform(**options)(image) * 255
    drawn = np.array(seen_part(image, config).resize((64, 64), Image.Resampling.BILINEAR))
    difference = torch.from_numpy(drawn).permute(2, 0, 1) - expected
    assert difference.abs().max() < 4


def test_the_map_is_hot_where_the_activation_is():
    activation = torch.zeros(4, 4)
    activation[0, 3] = 2.0  # top right
    drawn = explain(Image.new("RGB", (60, 40), "grey"), ["a 1%"] * 5, activation)
    hot, cold = drawn.getpixel((2 * SIDE - 30, 60)), drawn.getpixel((SIDE + 40, 300))
    assert hot[0] > cold[0] + 50
    assert cold[2] > hot[2] + 20


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes that end early are a matter of shells")
def test_a_reader_that_has_had_enough_is_no_error():
    command = [
        sys.executable,
        "-c",
        "from gld_zoo.cli import main; main(['list'])",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert b"Traceback" not in error
    assert b"BrokenPipe" not in error


def test_predictions_stay_with_their_files(tmp_path, rows, capsys):
    for name, i in (("a", 0), ("b", 33)):
        (tmp_path / f"{name}.png").write_bytes(rows["test"]["img"][i]["bytes"])
    a, b = (tmp_path / f"{name}.png" for name in "ab")
    found = []
    for files in ([a], [b], [b, a]):
        output = run(capsys, "predict", "--json", *files)
        found += [json.loads(line) for line in output.splitlines()]
    first, second, both = (one["classes"][0]["label"] for one in found[:3])
    assert found[2]["image"] == str(b)
    assert both == second != first


def test_labels_are_the_whole_images_then_the_cells(monkeypatch):
    given = []
    monkeypatch.setattr(
        "gld_zoo.predictor.explain", lambda image, labels, activation: given.append(labels)
    )
    predictor = Predictor("gld_wrn16_1")
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    image = Image.fromarray(noise)
    predictor.explain(image, 2)
    with torch.no_grad():
        logits = global_local_logits(predictor.model, predictor.transform(image)[None])[0]
    best = logits.softmax(1).max(1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    assert given[0] == [f"{predictor.names[i]} {p:.0%}" for i, p in pairs]


def test_words_are_in_their_own_cell():
    image, flat = Image.new("RGB", (60, 60), "grey"), torch.zeros(4, 4)
    labels = [" ", " ", "MMM MMM", " ", " "]  # the second cell: top right
    blank, drawn = (np.asarray(explain(image, w, flat)).astype(int) for w in ([" "] * 5, labels))
    rows, columns = np.nonzero(np.abs(drawn - blank).sum(2))
    assert rows.max() < blank.shape[0] - SIDE / 2
    assert columns.min() > SIDE / 2


def test_a_photo_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 8)


@pytest.fixture
def printed_to(monkeypatch):
    """Run a program with its standard output on a stream; return what the program ends with."""

    def run_to(stream, program, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as stop:
                program([str(argument) for argument in arguments])
        return stop.value.code

    return run_to


def to_ascii(printed_to, program, *arguments):
    """Run a program on a terminal that holds ASCII alone; return what it printed."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printed_to(terminal, program, *arguments) == 0
    return terminal.buffer.getvalue().decode("ascii")


STRANGE = "\u4e2d\xf6\udcf6"  # CJK, an accent, and a byte that is no UTF-8
ESCAPED = r"\u4e2d\xf6\udcf6"


def test_names_that_the_terminal_cannot_hold_are_escaped(
    pictures, tmp_path, printed_to, monkeypatch
):
    image, drawn = tmp_path / f"{STRANGE}.png", tmp_path / f"{STRANGE}-out.png"
    image.write_bytes((pictures / "0.png").read_bytes())
    save_pretrained(
        timm.create_model("gld_wrn16_1", num_classes=2), tmp_path, label_names=["L\xf6we", "\u4e2d"]
    )
    model = ["--model", f"local-dir:{tmp_path}"]
    line = to_ascii(printed_to, main, "predict", image, *model)
    assert f"{ESCAPED}.png: " in line
    assert all(name in line for name in (r"L\xf6we ", r"\u4e2d "))
    line = to_ascii(printed_to, main, "predict", image, *model, "--json")
    assert json.loads(line)["image"] == str(image)
    line = to_ascii(printed_to, main, "explain", image, "-o", drawn, *model)
    assert f"{ESCAPED}-out.png: 640 x" in line
    assert drawn.is_file()
    results = Results.load()
    row = results.weights["gld_wrn16_1.ce_cifar100"]
    results.weights["gld_wrn16_1.ce_cifar100"] = dataclasses.replace(row, hardware=STRANGE)
    monkeypatch.setattr(Results, "load", lambda: results)
    assert ESCAPED in to_ascii(printed_to, main, "info", "gld_wrn16_1")
    assert "wrn16_2_cifar100 (" in to_ascii(printed_to, main, "list")


def test_predictions_of_a_segmenter_are_escaped_and_do_not_need_a_reader(
    pictures, tmp_path, printed_to, capsys
):
    model = create_deeplabv3plus("gld_resnet18", 2, pretrained_backbone=False)
    save_downstream(model, tmp_path / "model", label_names=["L\xf6we", "\u4e2d"], image_size=32)
    image = tmp_path / f"{STRANGE}.png"
    image.write_bytes((pictures / "0.png").read_bytes())
    options = [tmp_path / "model", image, pictures / "1.jpg", "--out"]
    lines = to_ascii(printed_to, draw.cli, *options, tmp_path / "drawn")
    assert f"{ESCAPED}.png: " in lines
    assert r"L\xf6we " in lines or r"\u4e2d " in lines
    with ended_pipe() as pipe:
        assert printed_to(pipe, draw.cli, *options, tmp_path / "unread") == 0
    assert "the drawings go on" in capsys.readouterr().err
    message = printed_to(sys.stdout, draw.cli, "x" * 300, image, "--out", tmp_path / "out")
    assert message.startswith("error: ")
    drawn, unread = (sorted((tmp_path / name).iterdir()) for name in ("drawn", "unread"))
    assert [path.name for path in unread] == [path.name for path in drawn]


@contextlib.contextmanager
def ended_pipe():
    """A pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        yield pipe


PRINTING = [["list"], ["info", "gld_wrn16_1"], ["predict", "0.png"], ["--help"]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", PRINTING, ids=lambda arguments: arguments[0])
def test_output_that_is_not_taken_is_one_line(pictures, printed_to, arguments, capsys, monkeypatch):
    monkeypatch.chdir(pictures)
    with open("/dev/full", "w") as full:
        code = printed_to(full, main, *arguments)
    assert code == (
        "error: cannot write to standard output: No space left on device; send it elsewhere"
    )
    with ended_pipe() as pipe:
        assert printed_to(pipe, main, *arguments) == 141
    assert "Bad file descriptor" in printed_to(None, main, *arguments)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_line_at_the_programs_end_too():
    """What the interpreter still holds is written at its end, where it says so at length."""
    command = [
        sys.executable,
        "-c",
        "from gld_zoo.cli import main; main(['list'])",
    ]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "error: cannot write to standard output: No space left on device; send it elsewhere"
    ]


LETTERS = [
    "L\xf6we",
    "\u0141\xf3d\u017a",
    "\u4e2d\u6587 \xf6",
    "\u0928\u092e\u094d",
    "a\xa0b\tc",
    "cat",
]


@pytest.mark.parametrize("text", LETTERS, ids=ascii)
@pytest.mark.parametrize("alone", [False, True])
def test_every_letter_drawn_is_one_of_the_fonts(text, alone, monkeypatch):
    ttlib = pytest.importorskip("fontTools.ttLib")
    if alone:  # Pillow's own font, which has ASCII
        monkeypatch.setattr("gld_zoo.fonts.SYSTEM_FONTS", ())
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    drawn, font = drawable(text, 12)
    file = font.path if isinstance(font.path, str) else io.BytesIO(font.font_bytes)
    letters = ttlib.TTFont(file, fontNumber=0).getBestCmap()
    assert all(ord(letter) in letters for letter in drawn), drawn
    assert drawn.isprintable()


def test_letters_that_no_font_has_are_spelt(monkeypatch):
    monkeypatch.setattr("gld_zoo.fonts.SYSTEM_FONTS", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert drawable("L\xf6we \u4e2d \xdf", 12)[0] == r"Lowe \u4e2d \xdf"


def test_letters_that_a_font_has_are_kept(monkeypatch):
    pytest.importorskip("matplotlib")  # which brings one
    monkeypatch.setattr("gld_zoo.fonts.SYSTEM_FONTS", ())
    assert drawable("L\xf6we \u4e2d \xdf", 12)[0] == "L\xf6we \\u4e2d \xdf"


def test_the_picture_shows_letters_and_no_boxes(monkeypatch):
    monkeypatch.setattr("gld_zoo.fonts.SYSTEM_FONTS", ())
    image, flat = Image.new("RGB", (60, 60), "grey"), torch.zeros(4, 4)

    def draw(name):
        return np.asarray(explain(image, [f"{name} 5%"] * 5, flat))

    assert np.array_equal(draw("\u4e2d"), draw(r"\u4e2d"))
    pytest.importorskip("matplotlib")
    assert not np.array_equal(draw("L\xf6we"), draw("Lowe"))
    assert not np.array_equal(draw("\xf6"), draw("\xe4"))  # as two boxes would be


def test_long_escapes_stay_in_their_cell(monkeypatch):
    monkeypatch.setattr("gld_zoo.fonts.SYSTEM_FONTS", ())
    image, flat = Image.new("RGB", (60, 60), "grey"), torch.zeros(4, 4)
    for grid in (2, 4):
        labels = [" "] * (1 + grid**2)
        blank = np.asarray(explain(image, labels, flat)).astype(int)
        labels[2] = "\u4e2d\u6587\u52a8\u7269\u56ed 5%"
        drawn = np.asarray(explain(image, labels, flat)).astype(int)
        rows, columns = np.nonzero(np.abs(drawn - blank).sum(2))
        assert rows.max() < HEAD + SIDE / grid
        assert SIDE / grid < columns.min() < columns.max() < 2 * SIDE / grid


def test_a_recipe_is_shown_with_what_it_scored(capsys):
    shown = run(capsys, "info", "quickstart")
    assert "student: gld_wrn16_1" in shown
    assert "# on record: gld_wrn16_1.quickstart_alone, changes teacher None: top-1" in shown


@pytest.mark.slow
def test_commands_without_their_packages_name_the_extra():
    code = (
        "import sys\n"
        "sys.modules.update(jsonargparse=None, datasets=None)\n"
        "from gld_zoo.cli import TRAINING_COMMANDS, main\n"
        "for name in TRAINING_COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as stop: print(stop.code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    for (name, command), line in zip(TRAINING_COMMANDS.items(), lines, strict=True):
        assert line.startswith(f"error: gld-zoo {name} needs ")
        assert line.endswith(f'comes with an extra: pip install "gld-zoo[{command.extra}]"')


def test_the_page_without_its_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("gld_zoo.demo", "gld_zoo.demo.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    message = run(capsys, "demo", code="error")
    extra = 'comes with an extra: pip install "gld-zoo[demo]"'
    assert message == f"error: gld-zoo demo needs gradio, which {extra}"
    assert "65536 is not from 0 to 65535" in run(capsys, "demo", "--port", 65536, code=2)


@pytest.mark.parametrize("name", sorted(TRAINING_COMMANDS))
def test_every_command_of_the_trainer_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (0, None)
    assert f"usage: gld-zoo {name} " in capsys.readouterr().out
