"""Show what a run would read of a dataset: splits, columns, classes, and what is odd.

    gld-zoo data DATASET
    gld-zoo data DATASET --json facts.json --picture sheet.png

Boxes (a column `objects`) and masks (a column `mask`) are known by their columns. A dataset that no
run could use ends in an error and status 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gld_zoo.output import end, printing
from gld_zoo.training.common.disk import replacing, write_text
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.config.dataset_options import add_source_options
from gld_zoo.training.data.columns import listed
from gld_zoo.training.data.sources import HELD_OUT, counted, guessed_columns
from gld_zoo.training.measure.contact_sheet import draw_sheet
from gld_zoo.training.measure.dataset_report import report_on

RARE = 10  # classes that the table shows
# what an image has, and what is counted of each class
KINDS = dict(classes=("a class", "images"), boxes=("boxes", "boxes"), masks=("a mask", "pixels"))


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    add_source_options(parser, positional=True, test_fraction="auto")
    parser.add_argument("--bbox_format", type=str, default="xyxy", help="of boxes: xyxy or xywh")
    parser.add_argument(
        "--duplicates", type=bool, default=True, help="decode all images to find equal ones"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", type=str | None, help="print as JSON, or write it to a file"
    )
    parser.add_argument(
        "--picture",
        nargs="?",
        const=Path("contact_sheet.png"),
        type=Path | None,
        help="PNG of images with their classes; alone, contact_sheet.png",
    )
    options = parser.parse_args(arguments)
    try:
        found, rows = report_on(options)
        text = json.dumps(found, indent=2)
        print(text if options.json == "-" else report_text(found, _told(found)))
        if options.json not in (None, "-"):
            write_text(Path(options.json), text + "\n")
        if options.picture:
            with replacing(options.picture) as temporary:
                names = found["classes"] if found["kind"] == "classes" else []
                draw_sheet(rows["train"], names, f"{found['dataset']}, train", temporary)
    except TrainingError as error:
        sys.exit(f"error: {error}")


def report_text(facts_: dict[str, Any], lines: Sequence[str]) -> str:
    """Return what was found as lines for people.

    Args:
        facts_: As `report_on` returned it.
        lines: What `facts` says beside it.
    """
    names, (label, unit) = facts_["classes"], KINDS[facts_["kind"]]
    splits = ", ".join(f"{name} {count:,}" for name, count in facts_["splits"].items())
    text = [f"{facts_['dataset']}: images, each with {label}: {splits}"]
    text.append(f"columns: {facts_['image_column']} and {facts_['label_column']}")
    text.append(f"{len(names)} classes: {listed(names)}")
    for split, counts in facts_["counts"].items():
        rare = sorted(counts.items(), key=lambda pair: pair[1])[:RARE]
        shown = ", ".join(f"{name} {count:,}" for name, count in rare)
        which = "each class" if len(names) <= RARE else "the rarest classes"
        text.append(f"{unit} of {which} in {split}: {shown}")
    if HELD_OUT in facts_["counts"]:
        text.append(f"{HELD_OUT}: set aside of train to test on, as there is no test split")
    for split, seen in facts_["seen"].items():
        modes = ", ".join(f"{mode} {count}" for mode, count in seen["modes"].items())
        text.append(
            f"sizes in {split}, {seen['images']} images seen: {seen['smallest']} to "
            f"{seen['largest']}, most often {seen['commonest']}; modes {modes}"
        )
    if "duplicates" in facts_:
        text.append(f"images that both splits hold: {facts_['duplicates']}")
    text += [*lines, *(f"warning: {warning}" for warning in facts_["warnings"])]
    return "\n".join(text)


def _told(found: dict[str, Any]) -> list[str]:
    lines = [f"passed over: {counted(found['passed_over']) or 'nothing'}"]
    if reasons := found.get("column_reasons"):
        lines += guessed_columns({kind: found[f"{kind}_column"] for kind in reasons}, reasons)
    return lines
