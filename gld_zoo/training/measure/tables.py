"""What was measured, in words for people."""

from __future__ import annotations

from typing import Any

WORST = 10  # classes that the table shows, of few only half of them


def table(result: dict[str, Any]) -> str:
    """Return a result as lines of name and value for people."""
    percent = ("top1", "top5", "train_top1", "teacher_top1", "agreement", "calibration_error")
    units = dict.fromkeys(percent, "%") | dict.fromkeys(("image_size", "teacher_image_size"), "px")
    units["images_per_second"] = ""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            count = min(WORST, -(-len(value) // 2))
            name, text = f"worst {count} classes", worst_classes(value, count)
        elif isinstance(value, bool):
            if not value:
                continue
            text = "yes"
        elif isinstance(value, list):
            text = "  ".join(f"{item:.2f}" for item in value) + " %"
        elif isinstance(value, float):
            text = f"{value:.2f} {units[name]}" if name in units else f"{value:g}"
        else:
            text = f"{value:,} {units.get(name, '')}" if isinstance(value, int) else value
        lines.append(f"{name.replace('_', ' '):<18} {text.strip()}")
    return "\n".join(lines)


def worst_classes(top1: dict[str, float | None], count: int) -> str:
    """Return the classes of the lowest top-1, in words; those without images are left out."""
    measured = [(value, name) for name, value in top1.items() if value is not None]
    return ", ".join(f"{name} {value:.1f} %" for value, name in sorted(measured)[:count])
