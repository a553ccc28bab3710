"""Small made-up scenes with boxes and masks, in hub layout: plain rectangles on dark noise."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

COLORS = {0: (250, 60, 60), 1: (60, 250, 60), 2: (60, 60, 250)}
NAMES = ["red", "green", "blue"]


def scene(number, size=(96, 72), objects=2):
    """Return an image `[H, W, 3]`, its boxes, categories, and mask (class + 1, 0 for nothing)."""
    draw = np.random.default_rng(number)
    width, height = size
    image = draw.integers(0, 40, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    boxes, categories = [], []
    for i in range(objects):
        w, h = draw.integers(20, 30, 2)
        x = int(draw.integers(0, width // objects - w)) + i * (width // objects)
        y = int(draw.integers(0, height - h))
        category = int(draw.integers(0, 3))
        image[y : y + h, x : x + w] = COLORS[category]
        mask[y : y + h, x : x + w] = category + 1
        boxes.append([float(x), float(y), float(x + w), float(y + h)])
        categories.append(category)
    return image, boxes, categories, mask


def encode(array):
    """Encode an image or a mask, as datasets does."""
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, "PNG" if array.dtype == np.uint8 else "TIFF")
    return {"bytes": file.getvalue(), "path": None}


def _write(folder, splits, features):
    for name, columns in splits.items():
        path = folder / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return folder


def write_detection(folder, splits, *, classes=tuple(NAMES)):
    """Write `{split: [(image, boxes, categories, difficult)]}`."""
    features = Features(
        image=Image(),
        objects=dict(
            bbox=List(List(Value("float32"))),
            category=List(ClassLabel(names=list(classes))),
            difficult=List(Value("int64")),
        ),
    )
    columns = {
        name: dict(
            image=[encode(image) for image, *_ in rows],
            objects=[
                dict(bbox=boxes, category=categories, difficult=difficult)
                for _, boxes, categories, difficult in rows
            ],
        )
        for name, rows in splits.items()
    }
    return _write(folder, columns, features)


def write_segmentation(folder, splits):
    """Write `{split: [(image, mask)]}`."""
    features = Features(image=Image(), mask=Image())
    columns = {
        name: dict(
            image=[encode(image) for image, _ in rows], mask=[encode(mask) for _, mask in rows]
        )
        for name, rows in splits.items()
    }
    return _write(folder, columns, features)


def detection_rows(numbers, **options):
    """Return rows of scenes, nothing difficult."""
    rows = []
    for number in numbers:
        image, boxes, categories, _ = scene(number, **options)
        rows.append((image, boxes, categories, [0] * len(boxes)))
    return rows


def segmentation_rows(numbers, **options):
    """Return rows of scenes."""
    return [(image, mask) for image, _, _, mask in (scene(n, **options) for n in numbers)]
