"""How files become tensors, as plain values that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import InputError
from common.plain import build

MAX_CLASSES = 255  # class maps are uint8
MAX_SIDE, MAX_CHANNELS = 2**16, 1024  # more is a mistake, or a file made to fill the memory
CROPS = ("center", "random")
WINDOW_SCOPES = ("image", "dataset")
WINDOW_CHANNELS = ("joint", "separate")
CHOICES = {"crop": CROPS, "window_scope": WINDOW_SCOPES, "window_channels": WINDOW_CHANNELS}
# Gray values (low, high) that become -1 and 1: one pair for all channels of an image, or one for each.
Window = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class DataConfig:
    """How files become tensors. A checkpoint keeps it as a plain dict, so that sampling repeats it.

    Metadata of a field name the flag that sets it, if that is not the field's own name (see ``engine.config``).

    Attributes:
        image_size: side of the square that the model sees, in pixels.
        num_classes: K, background included.
        crop: "center" (short side resized to ``image_size``, middle square) or "random" (square at native scale).
        window: percentiles (0..100) of an image's gray values that become -1 and 1. None: 0..255 for 8-bit images,
            :data:`ROBUST_PERCENTILES` for all others.
        window_scope: "image" (each image its own percentiles) or "dataset" (those of all images together).
        window_channels: "joint" (one window for all channels: RGB keeps its colours) or "separate" (each its own:
            stains differ in brightness). None: a data set decides by its files.
        window_values: gray values of the window, set by the data set when ``window_scope`` is "dataset".
        channels: image channels; one stored channel is repeated to three, three equal ones count as one.
        mask_values: stored value of each class, in the order of the classes, if these are not 0..K-1.
    """

    image_size: int
    num_classes: int = 2
    crop: str = "center"
    window: tuple[float, float] | None = None
    window_scope: str = "image"
    window_channels: str | None = "joint"
    window_values: Window | None = field(default=None, metadata={"flag": None})
    channels: int = field(default=3, metadata={"flag": "in_channels"})
    mask_values: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.window is not None:  # lists where the dict went through JSON
            object.__setattr__(self, "window", (float(self.window[0]), float(self.window[1])))
        if self.mask_values is not None:
            object.__setattr__(self, "mask_values", tuple(int(value) for value in self.mask_values))
        if self.window_values is not None:
            pairs = tuple((float(low), float(high)) for low, high in self.window_values)
            object.__setattr__(self, "window_values", pairs)
        self._check()

    def _check(self) -> None:
        if not 1 <= self.image_size <= MAX_SIDE:
            raise InputError(f"`image_size` {self.image_size} must lie in 1..{MAX_SIDE}")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise InputError(f"`channels` {self.channels} must lie in 1..{MAX_CHANNELS}")
        if not 2 <= self.num_classes <= MAX_CLASSES:
            wrong = f"`num_classes` {self.num_classes} must lie in 2..{MAX_CLASSES}, background included"
            raise InputError(wrong)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "window_channels" and value is None):
                raise InputError(f"`{name}` {value!r} is unknown; choose one of {', '.join(choices)}")
        if self.window is not None and not 0 <= self.window[0] < self.window[1] <= 100:
            low, high = self.window
            raise InputError(f"`window` {low:g} {high:g}: give two percentiles, 0 <= LOW < HIGH <= 100")

    def with_mask_values(self, values: Sequence[int] | None) -> DataConfig:
        """The same, for masks that store their classes as ``values``; None keeps those of training."""
        return self if values is None else dataclasses.replace(self, mask_values=tuple(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain types for checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a value has the wrong type, or is outside of its range.
        """
        return build(cls, values)
