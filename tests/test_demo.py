"""The page of `gld-zoo demo`: what it shows, what it says when it cannot, and what it asks for."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from datasets import load_dataset
from PIL import Image
from safetensors.torch import save_file

from gld_zoo.explain import SIDE
from gld_zoo.hub import save_pretrained
from gld_zoo.images import read_image
from gld_zoo.output import CommandError
from gld_zoo.predictor import Predictor
from helpers import BUNDLED, CHECKOUT

pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[demo]"')

from gld_zoo import demo
from gld_zoo.demo import looking
from gld_zoo.demo.page import compare

CHROMIUM = "/usr/bin/chromium"
PARTS = ("classes", "cells", "note")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A photograph, and what is none: a damaged file, a text of an image's name."""
    folder = tmp_path_factory.mktemp("files")
    tiger = looking.EXAMPLES / "tiger.png"
    Image.open(tiger).resize((300, 200)).save(folder / "tiger.jpg")
    (folder / "cut.png").write_bytes(tiger.read_bytes()[:500])
    (folder / "notes.png").write_text("no image")
    return folder


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path_factory):
    """What the page sets for its process goes back with the test."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def shown(path, student=looking.STUDENT, teacher="", grid=2, listed=None):
    """Return what the page shows; a part that is hidden is None."""
    updates = compare(path and str(path), student, teacher, grid, listed=listed)
    problem, _, *student_side, column, c, i, n, numbers = updates
    beside = dict(zip(PARTS, map(seen, (c, i, n)), strict=True)) if column["visible"] else None
    side = dict(zip(PARTS, map(seen, student_side), strict=True))
    return dict(problem=problem["value"], student=side, teacher=beside, numbers=numbers)


def seen(update):
    return update["value"] if update["visible"] else None


def test_a_student_is_shown_beside_its_teacher(files):
    teacher = looking.teacher_of(looking.STUDENT)
    page = shown(files / "tiger.jpg", teacher=teacher)
    for name, side in ((looking.STUDENT, page["student"]), (teacher, page["teacher"])):
        predictor, image = Predictor(name), read_image(files / "tiger.jpg")
        assert side["classes"] == dict(predictor.classify([image], looking.CLASSES)[0])
        assert np.array_equal(side["cells"], predictor.explain(image, 2))
    assert page["problem"] == ""
    student, beside = page["numbers"]
    assert (student["model"], beside["model"]) == (looking.STUDENT, teacher)
    assert student["parameters"] == sum(
        p.numel() for p in Predictor(looking.STUDENT).model.parameters()
    )
    assert student["milliseconds"] > 0
    assert shown(files / "tiger.jpg")["teacher"] is None


def test_the_page_begins_with_weights_that_ship():
    names = looking.zoo_models()
    assert sorted(names) == sorted(timm.list_models("gld_*", pretrained=True))
    assert looking.STUDENT in names
    assert looking.teacher_of(looking.STUDENT) in names
    assert looking.teacher_of("resnet18") is looking.teacher_of("gld_wrn16_1.ce_cifar100") is None


def test_examples_are_bundled_images_and_small():
    paths = sorted(looking.EXAMPLES.glob("*.png"))
    assert len(paths) == 6
    assert sum(path.stat().st_size for path in paths) < 60_000
    test = load_dataset(str(BUNDLED), split="test")
    names = test.features["fine_label"].names
    for path in paths:
        same_class = test.filter(names.index(path.stem).__eq__, input_columns="fine_label")["img"]
        image = read_image(path).tobytes()
        assert any(each.convert("RGB").tobytes() == image for each in same_class)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "Drop a picture above"),
        ("cut.png", "cut.png cannot be read: "),
        ("notes.png", "notes.png is not a picture that can be read; give a JPEG"),
        ("gone.png", "gone.png cannot be read: "),
    ],
)
def test_what_is_no_picture_is_told(files, name, message):
    page = shown(name and files / name, teacher=looking.STUDENT)
    assert message in page["problem"]
    assert page["student"] == page["teacher"] == dict(classes=None, cells=None, note=None)


def test_what_a_model_cannot_is_told_and_the_other_is_shown(files, tmp_path):
    page = shown(files / "tiger.jpg", "nonsense", looking.STUDENT)
    assert "'nonsense' cannot be created: Unknown model" in page["student"]["note"]
    assert "Choose one from the list" in page["student"]["note"]
    assert page["teacher"]["cells"].width == 2 * SIDE
    fine = shown(files / "tiger.jpg", "gld_resnet18.gldplus_cifar100", grid=3)["student"]
    assert len(fine["classes"]) == looking.CLASSES
    assert fine["cells"] is None
    assert "grid=3 needs a feature map of at least 3x3, got 2x2" in fine["note"]
    options = dict(img_size=64, depth=2, num_classes=3)
    save_pretrained(timm.create_model("vit_tiny_patch16_224", **options), tmp_path)
    token = shown(files / "tiger.jpg", f"local-dir:{tmp_path}")["student"]
    assert set(token["classes"]) == {"class 0", "class 1", "class 2"}
    assert "classifies its class token" in token["note"]


def test_strangers_get_listed_models_alone(files, tmp_path):
    """Whatever their browser sends: no folder of the server, no repository of the hub."""
    save_pretrained(timm.create_model("gld_wrn16_1", num_classes=3), tmp_path)
    folder = f"local-dir:{tmp_path}"
    for name in (folder, str(tmp_path), "hf-hub:timm/resnet18", "resnet18"):
        page = shown(files / "tiger.jpg", name, name, listed=looking.zoo_models())
        for side in (page["student"], page["teacher"]):
            assert side["classes"] is side["cells"] is None
            assert side["note"] == f"{name!r} is not offered here; choose from the list."
    for listed_only in (True, False):
        page = demo.build_page([folder], listed_only=listed_only)
        boxes = [each for each in page.blocks.values() if each.get_block_name() == "dropdown"]
        assert [box.allow_custom_value for box in boxes] == [not listed_only] * 2
        assert boxes[0].value == folder
        (asked,) = (each.fn for each in page.fns.values() if each.api_name == "compare")
        assert (asked.keywords["listed"] is not None) == listed_only


@pytest.fixture
def taught(tmp_path):
    """A finished run of three classes, and a function that says who taught it."""
    save_pretrained(
        timm.create_model("gld_wrn16_1", num_classes=3),
        tmp_path / "run" / "last",
        label_names=["ant", "bee_eater", "cat"],
    )

    def by(**teacher):
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(teacher))
        looking.load.cache_clear()
        return str(tmp_path / "run")

    return by


def test_a_run_stands_beside_its_teacher(taught, files):
    assert looking.teacher_of(taught(teacher="gld_wrn16_2")) == "gld_wrn16_2"
    assert looking.first_pair([taught(teacher="x", teacher_head="own")], None)[1] == "x"
    assert looking.first_pair([taught(teacher="x")], "y")[1] == "y"
    assert looking.teacher_of(taught(teacher=None)) is None
    note = shown(files / "tiger.jpg", taught(teacher=None))["student"]["note"]
    assert note.endswith("; knows 3 classes: ant, bee eater, cat")


def test_a_teacher_stands_beside_a_run_with_the_head_that_was_fitted_to_it(taught, files):
    run = taught(teacher="gld_wrn16_2.ce_cifar100", teacher_head="fit", teacher_size="own")
    beside = looking.teacher_of(run)
    assert beside == f"{run}/teacher_head.safetensors"
    missing = shown(files / "tiger.jpg", run, beside)["teacher"]["note"]
    assert "cannot be created: No such file" in missing
    head = dict(mean=torch.zeros(128), std=torch.ones(128))
    save_file(dict(head, weight=torch.zeros(3, 128), bias=torch.eye(3)[1] * 4), beside)
    looking.load.cache_clear()
    page = shown(files / "tiger.jpg", run, beside)["teacher"]
    assert max(page["classes"], key=page["classes"].get) == "bee eater"
    assert "It is gld_wrn16_2.ce_cifar100 with the head that this run fitted" in page["note"]
    assert page["cells"].width == 2 * SIDE


def test_a_teacher_of_relations_alone_is_named_and_not_shown(taught, files):
    run = taught(teacher="resnet18", teacher_head="none")
    assert looking.teacher_of(run) is None
    note = shown(files / "tiger.jpg", run)["student"]["note"]
    assert "It was taught by the relations of resnet18's features, which name no classes" in note


def test_examples_are_of_ones_own(files, tmp_path):
    own = tmp_path / "own"
    for number in range(20):
        (own / f"class{number // 5}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(own / f"class{number // 5}" / f"{number:02}.png")
    found = looking.find_examples([str(own)])
    assert len(found) == looking.SHOWN
    assert {os.path.basename(os.path.dirname(each)) for each in found} == set(os.listdir(own))
    assert looking.find_examples([str(files / "tiger.jpg")]) == [str(files / "tiger.jpg")]
    for patterns, message in (([str(files)], "cannot be read"), ([str(tmp_path / "x")], "x")):
        with pytest.raises(CommandError, match=message):
            looking.find_examples(patterns)


def test_a_model_is_loaded_once():
    assert looking.load(looking.STUDENT) is looking.load(looking.STUDENT)


def test_the_space_is_the_page_for_strangers():
    space = runpy.run_path(str(CHECKOUT / "demo" / "app.py"), run_name="app")
    (asked,) = (each.fn for each in space["demo"].fns.values() if each.api_name == "compare")
    assert sorted(asked.keywords["listed"]) == sorted(looking.zoo_models())
    card = (CHECKOUT / "demo" / "README.md").read_text()
    for line in ("sdk: gradio", "app_file: app.py", "license: apache-2.0"):
        assert f"\n{line}\n" in card
    assert "\ngld-zoo[demo]\n" in (CHECKOUT / "demo" / "requirements.txt").read_text()


@pytest.mark.slow
def test_the_server_asks_no_other_machine(monkeypatch):
    """Neither for its own version nor to tell anything, and it listens to this machine alone."""
    asked, pages, resolve = [], [], socket.getaddrinfo

    def record(host, *arguments, **options):
        asked.append(host)
        return resolve(host, *arguments, **options)

    def end(page):
        pages.append(page)
        page.close(verbose=False)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    monkeypatch.setattr("gradio.Blocks.block_thread", end)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    demo.serve(port=0)
    (page,) = pages
    assert page.server.config.host == "127.0.0.1"
    assert page.share_url is None
    assert set(asked) == {"127.0.0.1"}


@pytest.fixture
def address():
    """The address at which the command serves the page; Ctrl-C then ends it."""
    command = [sys.executable, "-m", "gld_zoo.cli", "demo", "--port", "0"]
    environment = dict(os.environ, PYTHONPATH=str(CHECKOUT))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        lines = [server.stdout.readline() for _ in range(4)]
        assert [line.split()[0] for line in lines[:3]] == ["starting", "loading", "loading"]
        yield re.match(r"(http://127\.0\.0\.1:\d+/) shows the page", lines[3])[1]
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "Traceback" not in errors


@pytest.fixture
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"needs Chromium at {CHROMIUM}")
def test_the_page_in_a_browser(browser, address, files):
    """A newcomer's way through it, mistakes included; nothing is asked of another machine."""
    page, requests = browser.new_page(viewport=dict(width=1280, height=900)), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)

    def expect(text):
        page.get_by_text(text).first.wait_for(timeout=30_000)

    def picture_of(side):
        return page.locator(".cells img").nth(side)

    def drawn_anew(action):
        before = picture_of(0).get_attribute("src")
        action()
        page.wait_for_function(
            "before => { const image = document.querySelector('.cells img');"
            " return image && image.src && !image.src.endsWith(before) && image.complete; }",
            arg=before,
        )
        assert picture_of(0).evaluate("image => image.naturalWidth") == 2 * SIDE

    def give(name):
        page.locator("#picture input[type=file]").first.set_input_files(files / name)

    def choose(label, name):
        box = page.get_by_label(label, exact=True).first
        box.fill(name)
        box.press("Enter")

    expect("180,916 parameters")
    expect("703,284 parameters")
    picture_of(1).wait_for()
    drawn_anew(lambda: give("tiger.jpg"))
    expect("tiger")
    drawn_anew(lambda: page.get_by_label("4 x 4").click())
    give("cut.png")
    expect("cut.png cannot be read")
    assert page.locator(".cells img").count() == 0
    give("notes.png")
    expect("notes.png is not a picture that can be read")
    give("tiger.jpg")
    picture_of(1).wait_for()
    drawn_anew(lambda: choose("Student", "gld_resnet20.r110_cifar100"))
    expect("278,324 parameters")
    choose("Student", "nonsense")
    expect("'nonsense' cannot be created")
    choose("Student", "gld_resnet18.gldplus_cifar100")
    expect("No 4 x 4 cells to show")
    page.get_by_label("2 x 2").click()
    picture_of(1).wait_for()
    choose("Teacher", "none")
    page.get_by_text("703,284 parameters").first.wait_for(state="hidden")
    strangers = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert len(requests) > 20
    assert strangers == []


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"needs Chromium at {CHROMIUM}")
def test_a_phone_shows_the_cells_at_their_size(browser, address):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto(address)
    page.locator(".cells img").first.wait_for()
    assert page.locator(".cells img").first.bounding_box()["width"] == 2 * SIDE
    assert page.evaluate("document.documentElement.scrollWidth") == 390
