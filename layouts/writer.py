"""A set of new masks on disk: its folder, its files, and how an interrupted set is continued."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from common.disk import write_bytes
from common.errors import InputError
from common.log import with_progress
from dataset.files import find_files, read_mask
from layouts.nuclei import NucleiSettings
from layouts.recombine import LayoutSettings
from layouts.statistics import Measurement, measure

# Stored in settings.json. Raise a number if a change of the code gives other files for the same settings.
GENERATORS = {"simulate": 1, "recombine": 2}
LARGEST_LABEL = 65535
KINDS = ("images", "classes", "masks", "instances")


def save_png(array: np.ndarray, path: Path) -> None:
    """Write an image whole or not at all."""
    content = io.BytesIO()
    Image.fromarray(array).save(content, format="PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content.getvalue())


def make_set(
    output: Path, prefix: str, count: int, kinds: list[str], make_image: Callable[[int], dict[str, np.ndarray]]
) -> dict[str, Measurement]:
    """Make the missing images, and measure the whole set. This includes images of an earlier, longer run.

    Args:
        output: folder of the set.
        prefix: first part of every name.
        kinds: subfolders with one file per image. "instances" is the last.
        make_image: index -> array by kind.
    """
    measurements = {}
    for index in with_progress(range(count), "masks", "image"):
        name = f"{prefix}_{index:06d}"
        files = {kind: output / kind / f"{name}.png" for kind in kinds}
        if all(path.is_file() for path in files.values()):
            measurements[name] = measure(read_mask(files["instances"]))
            continue
        arrays = make_image(index)
        for kind, path in files.items():
            if not path.is_file():
                save_png(arrays[kind], path)
        measurements[name] = measure(arrays["instances"])
    earlier = find_files(output / "instances", "instance labels")
    for name in earlier:
        if name not in measurements:
            measurements[name] = measure(read_mask(earlier[name]))
    return dict(sorted(measurements.items()))


def label_files(instance_map: np.ndarray, class_map: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Instance map, binary mask and class map in the types of their files."""
    if instance_map.max() > LARGEST_LABEL:
        cells = instance_map.max()
        raise InputError(f"{cells} cells in one image are too many for 16-bit ids; lower `image_size`")
    files: dict[str, np.ndarray] = {
        "masks": np.where(instance_map > 0, 255, 0).astype(np.uint8),
        "instances": instance_map.astype(np.uint16),
    }
    if class_map is not None:
        files["classes"] = class_map
    return files


def record_of(command: str, settings: NucleiSettings | LayoutSettings) -> dict[str, object]:
    """Content of settings.json."""
    return {"command": command, "generator": GENERATORS[command], **asdict(settings)}


def with_new_settings(record: dict[str, object]) -> dict[str, object]:
    """A record of an earlier version, with what newer settings were then."""
    return {"classes_sha256": None, "crop": "random", "single": False} | record
