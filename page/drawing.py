"""Draws the images of a label map, byte for byte as ``sample.py`` does."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.arguments import number_as_text
from common.errors import InputError, as_flag
from common.pictures import mask_picture, sheet_png, to_uint8
from dataset.files import encode_image, encode_tiff, image_suffix
from dataset.look_choice import LookChoice
from dataset.mask_facts import mask_stats
from dataset.masks import MaskRule, decide_mask_rule
from engine.machine import Machine
from engine.sampling import TILE_OVERLAP, ImageSampler, SamplingSettings, TrainedModel, image_seed
from page.labels import CELLS, LARGEST_LABEL, label_kinds
from page.looks import look_flags, shown_looks
from page.masks import StartMasks
from page.tasks import Cancelled, Task
from transport import ODE_METHODS

METHODS = tuple(name for name, method in ODE_METHODS.items() if not method.adaptive)
MOST_STEPS, MOST_IMAGES, MOST_GUIDANCE, MOST_BLUR = 250, 16, 20, 16
MOST_SEED = 2**53 - 1  # the largest whole number that a browser keeps exactly
MOST_IN_LINE = 8  # requests that run or wait
BATCH = 32  # images, or windows of a large canvas, at once
SECONDS_BETWEEN_CHECKS = 0.05

Result = TypeVar("Result")


class TooManyRequests(RuntimeError):
    """The line is full."""


@dataclass(frozen=True)
class DrawRequest:
    """What the page asks for.

    Attributes:
        label: (H, W) uint16.
        kind: what the label holds, one of ``Drawer.kinds``.
        blur: standard deviation in pixels of the Gaussian that makes the edges soft; 0 keeps the mask hard.
        seed: of the noise.
        count: images, each with its own noise.
        method: a fixed-step solver of ``ODE_METHODS``.
        num_steps: its steps.
        cfg_scale: guidance; 1 is none.
        look: whose look the images take; None if the model knows no looks.
        only: number of the one image to draw, for a quick look; None draws all.
    """

    label: np.ndarray
    kind: str
    blur: float
    seed: int
    count: int
    method: str
    num_steps: int
    cfg_scale: float
    look: LookChoice | None = None
    only: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "blur": (0, MOST_BLUR),
            "seed": (0, MOST_SEED),
            "count": (1, MOST_IMAGES),
            "num_steps": (1, MOST_STEPS),
            "cfg_scale": (0, MOST_GUIDANCE),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:  # NaN fails, too
                raise InputError(f"{name} {getattr(self, name)}: give {low} to {high}.")
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if self.only is not None and not 0 <= self.only < self.count:
            raise InputError(f"only {self.only}: give 0 to {self.count - 1}.")

    @property
    def indices(self) -> list[int]:
        """Numbers of the images to draw."""
        return list(range(self.count)) if self.only is None else [self.only]


@dataclass(frozen=True)
class MaskFile:
    """The mask of a drawing as a file that ``sample.py`` reads.

    Attributes:
        name: of the file.
        content: of the file.
        mask_type: what it holds.
        prob_map: (K, H, W) float32, what ``sample.py`` makes of it.
    """

    name: str
    content: bytes
    mask_type: str
    prob_map: Tensor


@dataclass(frozen=True)
class Verdict:
    """What the judge finds in an image: cells (H, W) bool, and their Dice with the mask."""

    found: np.ndarray
    dice: float


JudgeCall = Callable[[np.ndarray, np.ndarray], Verdict]  # image (H, W, C) uint8, cells of its mask (H, W) bool


@dataclass(frozen=True)
class Drawing:
    """Images of one mask.

    Attributes:
        images: of (C, H, W) float32 in [-1, 1], on the CPU.
        mask: what they were made from.
        nfe: network calls.
        command: line that gives the same images.
        verdicts: of the judge, one per image; empty without a judge.
    """

    images: list[Tensor]
    mask: MaskFile
    nfe: int
    command: str
    verdicts: list[Verdict]

    def sheet(self) -> bytes:
        """The PNG that ``sample.py`` writes."""
        return sheet_png([mask_picture(self.mask.prob_map), *self.images])


class Drawer:
    """Makes images in one worker thread, one request at a time. Others wait in a short line.

    Args:
        trained: the checkpoint.
        machine: device and precision.
        given: flags of ``sample.py`` for this checkpoint, such as ``{"ckpt": "0000800.pt"}``.
        judge: finds the cells of an image; None without a judge.
        masks: to begin a drawing with; None without a folder.
    """

    def __init__(
        self,
        trained: TrainedModel,
        machine: Machine,
        given: Mapping[str, Any],
        judge: JudgeCall | None = None,
        masks: StartMasks | None = None,
    ) -> None:
        self.trained = trained
        self.machine = machine
        self.judge = judge
        self.masks = masks
        self._given = dict(given)
        self.kinds = label_kinds(trained.data, trained.mask_type)
        self.has_soft_masks = trained.data.mask_values is None
        self.has_guidance = trained.config["model"].get("class_dropout_prob") != 0
        self._line = threading.BoundedSemaphore(MOST_IN_LINE)
        self._worker = ThreadPoolExecutor(1, "worker")

    def in_turn(self, work: Callable[[], Result], task: Task) -> Result:
        """The result of ``work``, done in the worker thread after what waits already.

        Args:
            work: what to do.
            task: asked whether anybody still waits, while others have their turn.

        Raises:
            Cancelled: nobody waits.
            TooManyRequests: the line is full.
        """

        def begin() -> Result:
            task.begin()
            return work()

        if not self._line.acquire(blocking=False):
            raise TooManyRequests(f"{MOST_IN_LINE} requests wait already. Try again in a moment.")
        future = self._worker.submit(begin)
        try:
            while not wait([future], SECONDS_BETWEEN_CHECKS).done:
                if task.is_abandoned() and future.cancel():
                    raise Cancelled
            return future.result()
        finally:
            self._line.release()
            del future  # else an error keeps this frame and all that the work held, such as a large mask

    def end(self) -> None:
        """Begin nothing more. Work that runs ends as its task says."""
        self._worker.shutdown(wait=False)

    @torch.no_grad()
    def draw(self, request: DrawRequest, task: Task) -> Drawing:
        """Images of a label.

        Args:
            request: what to draw.
            task: learns of the progress before every network call.

        Raises:
            InputError: a request that this model cannot serve.
            Cancelled: nobody waits.
        """
        mask, sampler = self.mask_file(request), self._sampler(request, task)
        indices = request.indices
        task.expect(self._runs(request, len(indices)))
        seeds = [image_seed(request.seed, index) for index in indices]
        images = sampler.samples(mask.prob_map, seeds, BATCH, self._looks(request, indices))
        truth = mask.prob_map.numpy().argmax(axis=0) > 0
        verdicts = [self.judge(to_uint8(image), truth) for image in images] if self.judge else []
        return Drawing(images, mask, sampler.nfe, self._command(request, mask), verdicts)

    @torch.no_grad()
    def trajectory(self, request: DrawRequest, index: int, most: int, task: Task) -> list[Tensor]:
        """At most ``most`` states (C, H, W) from noise to image ``index``. Errors as in :meth:`draw`."""
        if not 0 <= index < request.count:
            raise InputError(f"index {index}: give 0 to {request.count - 1}.")
        mask, sampler = self.mask_file(request), self._sampler(request, task)
        looks = self._looks(request, [index])
        look = None if looks is None else looks[0]
        return list(sampler.trajectory(mask.prob_map, image_seed(request.seed, index), BATCH, most, look).cpu())

    @torch.no_grad()
    def look_pictures(self, request: DrawRequest, task: Task) -> list[tuple[int, str, Tensor]]:
        """The mask in the looks of some training images: their numbers, their names, and the pictures (C, H, W).

        Errors as in :meth:`draw`.
        """
        training = self.trained.looks
        if training is None:
            raise InputError("This model was trained without looks.")
        numbers, looks = shown_looks(training)
        mask, sampler = self.mask_file(request), self._sampler(request, task)
        task.expect(self._runs(request, len(numbers)))
        seeds = [image_seed(request.seed, 0)] * len(numbers)
        images = sampler.samples(mask.prob_map, seeds, BATCH, looks)
        return [(number, training.names[number], image) for number, image in zip(numbers, images, strict=True)]

    def mask_file(self, request: DrawRequest) -> MaskFile:
        """The label as a mask file, and its class probabilities.

        Raises:
            InputError: labels that the model does not know, or soft edges that it cannot take.
        """
        config, label = self.trained.data, request.label
        if request.kind != CELLS and label.max() >= config.num_classes:
            raise InputError(f"class {label.max()}: this model has the classes 0 to {config.num_classes - 1}.")
        if request.kind != CELLS and config.mask_values is not None:
            values = np.array(config.mask_values)
            label = values.astype(np.uint16 if values.max() <= LARGEST_LABEL else np.int64)[label]
        mask_type = "instances" if request.kind == CELLS else "classes"
        prob_map = self._rule(label, mask_type).prob_map(label)
        if request.blur == 0:
            name = f"mask{image_suffix(1, label.dtype)}"
            return MaskFile(name, encode_image(label[:, :, None]), mask_type, torch.from_numpy(prob_map))
        if not self.has_soft_masks:
            raise InputError("This model reads classes by their gray values, so its masks have no soft edges.")
        soft = np.stack([ndimage.gaussian_filter(plane, request.blur, mode="nearest") for plane in prob_map]).clip(0, 1)
        content = encode_tiff(soft.transpose(1, 2, 0), colours=False)
        prob_map = self._rule(soft, "probability").prob_map(soft)
        return MaskFile("mask.tif", content, "probability", torch.from_numpy(prob_map))

    def _rule(self, mask: np.ndarray, mask_type: str) -> MaskRule:
        """How ``sample.py`` reads this mask."""
        config = self.trained.data
        values = config.mask_values if mask_type == "classes" else None
        return decide_mask_rule([mask_stats("mask", mask)], config.num_classes, mask_type, "mask", values=values)

    def _command(self, request: DrawRequest, mask: MaskFile) -> str:
        """The command line of ``sample.py`` that gives the same bytes. It finds the saved mask in its folder."""
        flags = {
            "ckpt": self._given["ckpt"],
            "mask_path": mask.name,
            "mask_type": mask.mask_type,
            "sampling_method": request.method,
            "num_sampling_steps": request.num_steps,
            "cfg_scale": number_as_text(request.cfg_scale),
            "seed": request.seed,
            "num_samples": request.count,
            **({"tile": True, "tile_scale": 1} if self._is_field(request) else {}),
            **look_flags(request.look),
            **self._given,
            "device": self.machine.device.type,
            "precision": self.machine.precision,
            "per_proc_batch_size": BATCH,
            "output": "samples.png",
        }
        words = ["python", "sample.py", "ODE"]
        for name, value in flags.items():
            words += [as_flag(name)] if value is True else [as_flag(name), str(value)]
        return shlex.join(words)

    def _is_field(self, request: DrawRequest) -> bool:
        """Whether the canvas has another size than the square that the model sees."""
        return request.label.shape != (self.trained.data.image_size,) * 2

    def _runs(self, request: DrawRequest, count: int) -> int:
        """Runs of the solver for this many images: one for each image of a field, else one for each batch."""
        return count if self._is_field(request) else -(-count // BATCH)

    def _looks(self, request: DrawRequest, indices: Sequence[int]) -> Tensor | None:
        """Standardised looks (n, N) of the images; None for no look."""
        if request.look is None:
            return None
        return request.look.batch(request.seed, indices, [])  # the drawn mask has no image of its own

    def _sampler(self, request: DrawRequest, task: Task) -> ImageSampler:
        if request.cfg_scale != 1 and not self.has_guidance:
            raise InputError("This model always saw its masks in training, so it has no guidance: give 1.")
        settings = SamplingSettings(
            method=request.method,
            num_steps=request.num_steps,
            cfg_scale=request.cfg_scale,
            tile_overlap=TILE_OVERLAP if self._is_field(request) else None,
        )
        trained = self.trained
        return ImageSampler(
            trained.model, trained.transport, trained.space, self.machine, settings, before_call=task.reach
        )
