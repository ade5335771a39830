"""Images without masks, and the mixture of labelled and unlabelled examples for training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError, list_some
from common.randomness import derived_seed
from dataset.checks import for_all, or_error, refuse_bad
from dataset.config import DataConfig, Window
from dataset.files import FileError, find_images, read_image
from dataset.folder_hints import list_folder, warn_of_skipped
from dataset.folders import PairedFolder, TrainingImages, sizes_by_name
from dataset.gray import check_type, fit_channels, image_window, to_tensor
from dataset.looks import Looks
from dataset.masks import to_prob_map
from dataset.scale import pixel_size, scale_warning
from dataset.views import SYMMETRIES, native_view, turn, view_of_file

logger = logging.getLogger(__name__)
MEMORY_GB = 4.0  # most memory for decoded images, per folder and process; beyond it, each access reads the file
PSEUDO_MASK_SHARE = 0.5  # fraction of draws that keep the pseudo-mask of an unlabelled image


class UnlabelledFolder(TrainingImages):
    """Images without masks, read like those of a :class:`PairedFolder`. All are checked at the start."""

    def __init__(self, image_dir: str | Path, config: DataConfig, seed: int, progress: bool) -> None:
        """Read and check all images.

        Args:
            config: settings of the labelled images, with ``window_values`` if the scope is "dataset".
            seed: decides every random choice, together with the draw of :meth:`__getitem__`.

        Raises:
            InputError: files are unusable. The message names them all.
        """
        listing = list_folder(image_dir, "image")
        files = find_images(image_dir, listing)
        warn_of_skipped([listing], files.values())
        self.names, self.image_paths = list(files), list(files.values())
        self.config, self.seed = config, seed
        self.windows, self.pixel_sizes = [], [pixel_size(path) for path in self.image_paths]
        self.dtypes: list[np.dtype] = []
        self._images: list[np.ndarray] = []
        self._latest: tuple[int, np.ndarray] | None = None  # read last
        self.in_memory = True
        errors, used = [], 0.0
        for result in for_all(or_error(self._read), self.image_paths, "reading unlabelled images", progress):
            if isinstance(result, FileError):
                errors.append(result)
                continue
            image, window, dtype = result
            self.windows.append(window)
            self.dtypes.append(dtype)
            used += image.nbytes
            if used > MEMORY_GB * 2**30:
                self.in_memory = False
                self._images = []
            if self.in_memory:
                self._images.append(image)
        refuse_bad(errors, len(self.names), f"unlabelled images of {image_dir}")
        where = "in memory" if self.in_memory else "read again at each access"
        logger.info("%d unlabelled images from %s, %s", len(self.names), image_dir, where)

    def _read(self, path: Path) -> tuple[np.ndarray, Window, np.dtype]:
        """An image as kept in memory, its window, and the type of its gray values."""
        image = self._decode(path)
        return self._cut(path, image), image_window(image, self.config), image.dtype

    def _decode(self, path: Path) -> np.ndarray:
        return fit_channels(read_image(path), self.config.channels, path)

    def _cut(self, path: Path, image: np.ndarray) -> np.ndarray:
        """What is kept of an image: with crop "center" the square, else all."""
        view = view_of_file(path, image.shape, self.config)  # refuses an image that is too small
        return np.ascontiguousarray(view.apply_image(image)) if self.config.crop == "center" else image

    def _kept_image(self, index: int) -> np.ndarray:
        if self.in_memory:
            return self._images[index]
        latest = self._latest
        if latest is None or latest[0] != index:  # the look of an example comes from the same image
            path = self.image_paths[index]
            self._latest = latest = (index, self._cut(path, self._decode(path)))
        return latest[1]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example, as in ``PairedFolder``. Its mask is all background."""
        index, draw = key
        rng = self._rng(draw)
        symmetry = int(rng.integers(SYMMETRIES))
        return {"image": self._image(index, rng, symmetry), "mask": self.mask(index, symmetry)}

    def _rng(self, draw: int) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self.seed, draw, 2))

    def symmetry(self, draw: int) -> int:
        """Which flip and turn :meth:`__getitem__` makes in this draw."""
        return int(self._rng(draw).integers(SYMMETRIES))

    def mask(self, index: int, symmetry: int) -> Tensor:
        """(S, S) uint8 class map of background, in place of a mask."""
        return torch.zeros(self.config.image_size, self.config.image_size, dtype=torch.uint8)

    def example(self, index: int) -> dict[str, Tensor]:
        """Like :meth:`__getitem__`, without flips and turns. A random crop takes the middle."""
        return {"image": self._image(index, None, 0), "mask": self.mask(index, 0)}

    def _image(self, index: int, rng: np.random.Generator | None, symmetry: int) -> Tensor:
        image = self._kept_image(index)
        if self.config.crop == "random":
            image = native_view(image.shape[0], image.shape[1], self.config.image_size, rng).cut(image)
        return to_tensor(turn(image, (0, 1), symmetry), self.windows[index], self.config.channels)


ImageFolder = PairedFolder | UnlabelledFolder


def read_unlabelled(
    image_dirs: Sequence[str | Path], mask_dirs: Sequence[str | Path], labelled: PairedFolder, progress: bool,
    normalize: bool = False,
) -> list[ImageFolder]:  # fmt: skip
    """Read folders of unlabelled images, and with ``mask_dirs`` a folder of soft pseudo-masks for each.

    Args:
        labelled: the training pairs.
        normalize: divide pseudo-masks by their sum. If False, refuse those that do not sum to one.

    Raises:
        InputError: a folder is empty or cannot be read, has images of the labelled folder or of another type than the
            window of the data set, or lacks a pseudo-mask.
    """
    if mask_dirs and len(mask_dirs) != len(image_dirs):
        raise InputError(
            f"`unlabelled_mask_path` names {len(mask_dirs)} folders for the {len(image_dirs)} of `unlabelled_path`: "
            "give one for each, in the same order"
        )
    for folder in image_dirs:
        refuse_shared_names(find_images(folder), folder, labelled)
    found: list[ImageFolder]
    if mask_dirs:
        config = dataclasses.replace(labelled.config, mask_values=None)  # probabilities store no class ids
        found = [
            PairedFolder(
                folder, masks, config, "probability", seed=labelled.seed, progress=progress, normalize=normalize
            )
            for folder, masks in zip(image_dirs, mask_dirs, strict=True)
        ]
    else:
        found = [UnlabelledFolder(folder, labelled.config, labelled.seed, progress) for folder in image_dirs]
    for folder, source in zip(image_dirs, found, strict=True):
        _refuse_other_types(source, folder, labelled)
    for warning in scale_warning(sizes_by_name([labelled, *found]), "labelled and unlabelled images"):
        logger.warning("%s", warning)
    return found


def _refuse_other_types(source: ImageFolder, folder: str | Path, labelled: PairedFolder) -> None:
    """Raise InputError if a window of the labelled images does not serve unlabelled ones, see ``check_type``."""
    known = sorted({str(dtype) for dtype in labelled.dtypes})
    errors = []
    for path, dtype in zip(source.image_paths, source.dtypes, strict=True):
        try:
            check_type(dtype, known, labelled.config, path)
        except FileError as error:
            errors.append(error)
    refuse_bad(errors, len(source.names), f"unlabelled images of {folder}")


def refuse_shared_names(paths: dict[str, Path], folder: str | Path, labelled: PairedFolder) -> None:
    """Raise InputError if images of an unlabelled folder have the names of labelled ones."""
    shared = sorted(set(labelled.names) & set(paths))
    if shared:
        raise InputError(
            f"`unlabelled_path` {folder}: {len(shared)} images have the names of labelled ones: {list_some(shared)}. "
            "Leave out images that have masks; rename the others."
        )


def refuse_shared_images(unlabelled: Sequence[ImageFolder], labelled: PairedFolder) -> None:
    """Raise InputError if an unlabelled image has the same file content as a labelled one."""
    known = set(labelled.image_hashes)
    for source in unlabelled:
        shared = [name for name, one in zip(source.names, source.image_hashes, strict=True) if one in known]
        if shared:
            raise InputError(
                f"`unlabelled_path`: {len(shared)} images are labelled ones under other names: {list_some(shared)}. "
                "Leave them out."
            )


class Source(Protocol):
    """A folder of examples, as tensors or as latents."""

    @property
    def in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]: ...

    def look_draw(self, index: int, draw: int) -> np.ndarray: ...


class Mixture(torch.utils.data.Dataset):
    """Labelled examples, then unlabelled ones, each with its look.

    Args:
        labelled: labelled pairs.
        unlabelled: folders of images without masks, or with pseudo-masks.
        looks: scale of the looks. None for a model without looks.
        seed: decides which draws of an image keep its pseudo-mask.
        pseudo_masks: whether the unlabelled folders have pseudo-masks.
        soft: return all masks as probabilities, because some are.
    """

    def __init__(
        self,
        labelled: Source,
        unlabelled: Sequence[Source],
        looks: Looks | None,
        num_classes: int,
        seed: int,
        pseudo_masks: bool,
        soft: bool,
    ) -> None:
        self.sources = [labelled, *unlabelled]
        self.starts = np.cumsum([0, *map(len, self.sources)])
        self.looks, self.num_classes, self.seed = looks, num_classes, seed
        self.pseudo_masks, self.soft = pseudo_masks, soft
        self.in_memory = all(source.in_memory for source in self.sources)

    def __len__(self) -> int:
        """Number of labelled examples."""
        return len(self.sources[0])

    @property
    def num_unlabelled(self) -> int:
        """Number of unlabelled examples; their indices follow those of the labelled ones."""
        return int(self.starts[-1]) - len(self)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example. Every random choice depends on (seed, draw).

        Returns:
            The example of its folder, with "has_mask": () bool, and "look": (N,) float32 if the model knows looks.
        """
        index, draw = key
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        source, index = self.sources[number], index - int(self.starts[number])
        item = source[index, draw]
        if self.soft and item["mask"].dtype == torch.uint8:
            item["mask"] = to_prob_map(item["mask"][None], self.num_classes)[0]
        item["has_mask"] = torch.tensor(number == 0 or (self.pseudo_masks and self._keeps_pseudo_mask(draw)))
        if self.looks is not None:
            item["look"] = torch.from_numpy(self.looks.standardise(source.look_draw(index, draw)))
        return item

    def _keeps_pseudo_mask(self, draw: int) -> bool:
        return np.random.default_rng(derived_seed(self.seed, draw, 3)).random() < PSEUDO_MASK_SHARE
