"""Looks on the page: whose look the images take, for models that were trained with looks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from common.spread import evenly
from dataset.config import DataConfig
from dataset.decode import decoding_at_most
from dataset.look_choice import NOBODY, PATH, TRAINING, LookChoice, choose_looks
from dataset.looks import Looks, look_count
from dataset.names import IMAGE_SUFFIXES
from engine.sampling import TrainedModel
from page.labels import MOST_DECODED
from page.uploads import uploaded

MOST_SHOWN = 12  # looks as thumbnails
LONGEST_NAME = 200


def read_look(value: Any, training: Looks | None, config: DataConfig) -> LookChoice | None:
    """The look that a request asks for.

    Args:
        value: of JSON: None, "training" (drawn by the seed) or "none", the number of a training image, or an object
            with the name and numbers of a reference image, see :func:`measure_reference`.
        training: looks of the checkpoint; None if the model knows no looks.
        config: of the checkpoint.

    Returns:
        None if the model knows no looks.

    Raises:
        InputError: the value is none of these, or the model knows no looks.
    """
    if training is None:
        if value is not None:
            raise InputError("look: this model was trained without looks.")
        return None
    if value is None or value in (TRAINING, NOBODY):
        return choose_looks(training, config, value, None, None)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return choose_looks(training, config, TRAINING, None, value)
    if not isinstance(value, dict):
        raise InputError("look: give training, none, a number, or a measured reference image.")
    name, numbers = value.get("name"), value.get("numbers")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
        raise InputError("look: a reference image has a name.")
    if not isinstance(numbers, list) or len(numbers) != look_count(config.channels):
        raise InputError("look: a reference image has its measured numbers.")
    if not all(isinstance(one, int | float) and abs(one) < math.inf for one in numbers):
        raise InputError("look: a number of the reference image is no number.")
    looks = training.with_images([name], np.array([numbers], np.float32))
    return LookChoice(PATH, looks, config, None, {})


def measure_reference(content: bytes, name: str, trained: TrainedModel) -> dict[str, Any]:
    """Name and numbers of a reference image from the browser, as :func:`read_look` takes them.

    Raises:
        InputError: the model knows no looks, or the file is no image that it can use.
    """
    if trained.looks is None:
        raise InputError("This model was trained without looks, so it takes no reference image.")
    with uploaded(content, name, IMAGE_SUFFIXES) as path, decoding_at_most(MOST_DECODED):
        choice = choose_looks(trained.looks, trained.data, None, path, None, dtypes=trained.image_types)
    return {"name": name, "numbers": choice.looks.numbers[0].tolist()}


def look_flags(choice: LookChoice | None) -> dict[str, Any]:
    """Flags of ``sample.py`` that choose the same look."""
    if choice is None:
        return {}
    if choice.source == PATH:
        return {"look_path": choice.looks.names[0]}
    return {"look": choice.source} | ({} if choice.number is None else {"look_index": choice.number})


def shown_looks(training: Looks) -> tuple[list[int], torch.Tensor]:
    """Numbers of some training images, evenly spread, and their standardised looks (n, N)."""
    numbers = evenly(len(training.names), MOST_SHOWN)
    return numbers, torch.from_numpy(training.standardise(training.numbers[numbers]))
