"""A page that shows what one or two models see in a picture, as a whole and cell by cell.

gld-zoo demo
gld-zoo demo --model runs/photos-0 --examples FOLDER
gld-zoo demo --model runs/mine --teacher gld_wrn16_2.ce_cifar100
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any
from urllib.request import getproxies

import gradio as gr

from gld_zoo.demo.looking import (
    STUDENT,
    View,
    find_examples,
    first_pair,
    load,
    look,
    read_picture,
    zoo_models,
)
from gld_zoo.output import CommandError

HOST = "127.0.0.1"  # of this machine alone
GRIDS = (1, 2, 3, 4)  # cells along each side

INTRODUCTION = """
# What small image models see

A small model, the **student**, has learnt from a larger one, the **teacher**: what is in the whole
picture, and what is in each of its cells. Give both a picture and compare.
"""
EXPLANATION = """
### How to read it

**Left:** the model's map of the picture is cut into cells, and the model's own classifier names
each of them. A cell shows little of the picture, a wheel, an ear or only grass, so its class often
differs from that of the whole, and with less confidence. These answers are what the student learns
from the teacher, cell by cell.

**Right** (on a phone, a swipe away): where the model reacts most, from dark blue (little) to
yellow.

What is none of the classes that a model knows is taken for the nearest of them. The models that
come with this zoo know the 100 of CIFAR-100, at 32 x 32 pixels (`gld_resnet18` at 64 x 64).
"""
# examples are small; on a phone the cells keep their size, and the map beside them is a swipe away
STYLE = """
#picture img { width: 100%; height: 100%; object-fit: contain; }
@media (max-width: 700px) {
  .cells .image-frame { overflow-x: auto; justify-content: flex-start; }
  .cells img { width: 640px; max-width: none; }
}
.cells { max-width: 642px; }
"""
# what `launch` takes for the page to look and behave as meant; fonts are the system's, and nothing
# is kept in the browser
LAUNCH: dict[str, Any] = dict(
    theme=gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    css=STYLE,
    footer_links=[],
    run_history=False,
    max_file_size="50mb",
    ssr_mode=False,
)


def compare(
    path: str | None, student: str, teacher: str | None, grid: int, *, listed: Sequence[str] | None
) -> list[Any]:
    """Return what the page shows of a picture.

    Args:
        path: The picture's file, or None.
        student: A model's name.
        teacher: Another's, or nothing.
        grid: Cells along each side.
        listed: The only names that may be asked for; None allows any.

    Returns:
        What is wrong with the picture; the student's classes, cells and note; whether there is a
        teacher's column, and the same of it; the numbers of both.
    """
    views, problem = [View(), View()], ""
    try:
        if path is None:
            raise CommandError("Drop a picture above, or take one of the examples.")
        image = read_picture(path)
        for place, name in enumerate((student, teacher)):
            if listed is not None and name and name not in listed:
                views[place] = View(note=f"{name!r} is not offered here; choose from the list.")
            elif name:
                views[place] = look(name.strip(), image, grid)
    except CommandError as error:
        problem = f"**{error}**"
    numbers = [view.numbers for view in views if view.numbers]
    columns = [gr.update(visible=True), gr.update(visible=bool(teacher))]
    shown = [[column, *_updates(view)] for column, view in zip(columns, views, strict=True)]
    return [gr.update(value=problem, visible=bool(problem)), *shown[0], *shown[1], numbers]


def _updates(view: View) -> list[Any]:
    return [gr.update(value=part, visible=bool(part)) for part in view[:3]]


def build_page(
    models: Sequence[str] = (),
    teacher: str | None = None,
    *,
    examples: Sequence[str] = (),
    listed_only: bool = False,
) -> gr.Blocks:
    """Build the page; `build_page().launch(**LAUNCH)` serves it.

    Args:
        models: Names to offer before the zoo's, as for `Predictor`; the first is shown.
        teacher: The name of the model beside it; None takes its teacher, if it is known.
        examples: Images to offer, as for `find_examples`.
        listed_only: Offer the listed models alone, for a page that strangers visit: no folders of
            this machine, no repositories of the hub.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    names = list(dict.fromkeys([*models, STUDENT, *zoo_models()]))
    _, teacher = first_pair(models, teacher)
    names += [teacher] if teacher and teacher not in names else []
    with gr.Blocks(
        title="gld_zoo: what small image models see",
        analytics_enabled=False,
        delete_cache=(600, 3600),  # seconds: each ten minutes, what is older than an hour
    ) as page:
        gr.Markdown(INTRODUCTION)
        inputs = _inputs(names, teacher, find_examples(examples), listed_only)
        problem = gr.Markdown(visible=False, elem_id="problem")
        with gr.Row():
            sides = [*_side("Student"), *_side("Teacher")]
        gr.Markdown(EXPLANATION)
        with gr.Accordion("The models in numbers", open=False):
            numbers = gr.JSON(show_label=False)
        gr.on(
            [page.load, *(each.change for each in inputs)],
            partial(compare, listed=names if listed_only else None),
            inputs,
            [problem, *sides, numbers],
            api_name="compare",
            show_progress="minimal",
            trigger_mode="always_last",
        )
    return page


def _inputs(
    names: list[str], teacher: str | None, examples: list[str], listed_only: bool
) -> list[Any]:
    """Lay out what is asked for: picture, student, teacher, grid."""
    free = "" if listed_only else ", or write any timm name, hf-hub:ORG/NAME or run folder"
    options: dict[str, Any] = dict(allow_custom_value=not listed_only)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            picture = gr.Image(
                examples[0],
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Picture",
                height=300,
                elem_id="picture",
                buttons=[],
            )
            # Gradio's own would open the file before our reader, whose message people understand
            picture.preprocess = lambda payload: payload and payload.path
        with gr.Column(scale=3, min_width=280):
            gr.Examples([[path] for path in examples], [picture], label="Examples")
            told = f"choose a model{free}"
            student = gr.Dropdown(names, value=names[0], label="Student", info=told, **options)
            others = [("none", ""), *((name, name) for name in names)]
            told = "another model to compare with, or none"
            beside = gr.Dropdown(others, value=teacher or "", label="Teacher", info=told, **options)
            sizes = [(f"{grid} x {grid}", grid) for grid in GRIDS]
            grid = gr.Radio(sizes, value=2, label="Cells")
    return [picture, student, beside, grid]


def _side(title: str) -> list[Any]:
    """Lay out what is shown of a model: its column, classes, cells and note."""
    with gr.Column(min_width=320) as column:
        gr.Markdown(f"### {title}")
        note = gr.Markdown()
        classes = gr.Label(label="The whole picture", show_heading=False)
        cells = gr.Image(
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen"],
            elem_classes="cells",
        )
    return [column, classes, cells, note]


def serve(
    models: Sequence[str] = (),
    teacher: str | None = None,
    *,
    examples: Sequence[str] = (),
    port: int | None = None,
    in_browser: bool = False,
) -> None:
    """Serve the page to this machine until Ctrl-C; pictures that were given are then deleted.

    Args:
        models: As for `build_page`.
        teacher: As for `build_page`.
        examples: As for `build_page`.
        port: None takes the first free one from 7860 on, 0 any free one.
        in_browser: Open it there.

    Raises:
        CommandError: If a model or an example cannot be had, or the port is not free.
    """
    first, beside = first_pair(models, teacher)
    for name in dict.fromkeys([*models, first, *([beside] if beside else [])]):
        print(f"loading {name}", flush=True)
        # one that nobody asked for may be gone; the page then says so
        with nullcontext() if name != beside or teacher else suppress(CommandError):
            load(name)
    # Gradio asks its own server whether it runs, which a proxy would not find
    os.environ["no_proxy"] = f"{getproxies().get('no', '')},{HOST}".strip(",")
    with tempfile.TemporaryDirectory(prefix="gld_zoo-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(models, teacher, examples=examples)
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=_free_port() if port == 0 else port,
                share=False,
                inbrowser=in_browser,
                quiet=True,
                prevent_thread_lock=True,
                **LAUNCH,
            )
        except OSError as error:
            raise CommandError(
                f"--port {port or '7860 to 7959'} is not free; name another, or 0 for any"
            ) from error
        print(f"{address} shows the page, on this machine alone; Ctrl-C ends it", flush=True)
        page.block_thread()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]
