"""Draw the missing images of a set. Draw an image again if a judge rejects it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from common.log import Pace
from dataset.gray import to_gray_values
from dataset.mask_folder import MaskItem
from engine.sampling import ImageSampler, image_seed
from synthetic.writer import Attempt, Job, SetWriter

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """Decides which draw of an image is kept, and when to stop."""

    def __call__(self, before: Attempt | None, prob_map: np.ndarray, image: np.ndarray, number: int) -> Attempt:
        """Return the better of two draws of an image.

        Args:
            before: the best draw so far; None if there is none.
            prob_map: (K, H, W) mask of the image.
            image: (H, W, C) uint8, the new draw.
            number: number of the new draw, from 1.
        """

    def is_done(self, attempt: Attempt) -> bool:
        """Whether no further draw is needed, or none is left."""


def draw_missing(
    writer: SetWriter,
    sampler: ImageSampler,
    todo: Sequence[tuple[Job, int]],
    batch_size: int,
    judge: Judge | None = None,
    progress: bool = False,
) -> None:
    """Draw and write images in rounds. Each round draws those images again that the judge rejected in the last round.

    The set notes after every image which draw is kept, so an interrupted command can continue.

    Args:
        todo: jobs, each with the number of its next draw.
        batch_size: images per network call; for large fields, tiles per network call.
        judge: None keeps every first draw.
        progress: show a progress bar, and no lines in the log.
    """
    with (
        ThreadPoolExecutor(max_workers=2) as threads,
        tqdm(total=len(todo), unit="image", disable=not progress) as bar,
    ):
        while todo:
            todo = _draw_round(writer, sampler, todo, batch_size, judge, threads, bar)


def _draw_round(
    writer: SetWriter,
    sampler: ImageSampler,
    todo: Sequence[tuple[Job, int]],
    batch_size: int,
    judge: Judge | None,
    threads: ThreadPoolExecutor,
    bar: tqdm,
) -> list[tuple[Job, int]]:
    """Draw every image once. Threads write while the next batch is drawn. Returns what to draw again."""
    size = batch_size if writer.masks.whole_scale is None else 1  # one field is a batch of tiles
    again: list[tuple[Job, int]] = []
    pending: list[Future[None]] = []
    pace = Pace(len(todo), "images")
    for first in range(0, len(todo), size):
        batch = todo[first : first + size]
        items = [writer.load(job) for job, _ in batch]
        images = _draw(writer, sampler, batch, items, batch_size)
        for (job, number), item, image in zip(batch, items, images, strict=True):
            attempt = None if judge is None else _judged(writer, judge, job, number, item, image)
            if attempt is None or attempt.number == number:  # this draw is the best so far
                pending.append(threads.submit(writer.write_pair, job, item, image, attempt))
            else:
                writer.write_attempt(job, attempt)
            if judge is None or attempt is None or judge.is_done(attempt):
                bar.update()
            else:
                again.append((job, number + 1))
        pending = _wait(pending, most_left=4 * size)
        if bar.disable:
            done = min(first + size, len(todo))
            logger.info("%d of %d images, %s", done, len(todo), pace(done))
    _wait(pending, most_left=0)
    if again:
        logger.info("%d of %d images do not follow their masks well enough and are drawn again", len(again), len(todo))
    return again


def _judged(writer: SetWriter, judge: Judge, job: Job, number: int, item: MaskItem, image: np.ndarray) -> Attempt:
    """The better of this draw, with its number, and the best one before it."""
    before = writer.attempt(job) if number > 1 else None
    shown = to_gray_values(image, None, np.dtype(np.uint8))
    return judge(before, np.asarray(item.prob_map), shown, number)


def _draw(
    writer: SetWriter,
    sampler: ImageSampler,
    batch: Sequence[tuple[Job, int]],
    items: Sequence[MaskItem],
    batch_size: int,
) -> np.ndarray:
    """Images (n, C, H, W) in [-1, 1] of jobs and their masks. A field comes alone: n is 1."""
    seeds = [image_seed(writer.seed, job.index, number) for job, number in batch]
    looks = None
    if writer.looks is not None:
        looks = writer.looks.batch(writer.seed, [job.index for job, _ in batch], items)
    prob_maps = torch.stack([torch.as_tensor(item.prob_map) for item in items])  # (n, K, H, W)
    if writer.masks.whole_scale is not None:
        look = None if looks is None else looks[0]
        return sampler.draw_field(prob_maps[0], seeds[0], batch_size, look)[None].cpu().numpy()
    return sampler(prob_maps, seeds, batch_size=batch_size, looks=looks).cpu().numpy()


def _wait(pending: list[Future[None]], most_left: int) -> list[Future[None]]:
    """Wait until at most ``most_left`` writes are left. Raises the error of a write that failed."""
    while len(pending) > most_left:
        pending.pop(0).result()
    return pending
