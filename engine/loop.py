"""The loop of a training run: batches, steps, metrics, previews, checkpoints, and a saved end on a signal."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import wandb_utils
from common.disk import write_atomically
from common.errors import EXIT_INTERRUPTED, STOP_SIGNALS
from common.log import duration
from dataset.batches import Batch, StepBatches, WaitingClock, make_loader, prefetch
from dataset.folders import PairedFolder
from dataset.unlabelled import ImageFolder, Mixture, Source
from dataset.views import SYMMETRIES
from engine.autoencoder import LatentSpace
from engine.checkpoint import export_safetensors, naming_checkpoint
from engine.config import NO_CACHE
from engine.latents import LatentPairs
from engine.machine import usable_cores
from engine.run_folder import PREVIEW_GRID, RunFolder
from engine.training import Previews, Training

logger = logging.getLogger(__name__)
WAITING_WORTH_SAYING = 0.05
EXIT_STOPPED_BY_SIGNAL = 143
SAME_CTRL_C_SECONDS = 2.0
MOST_LOADERS_PER_CORE = 8  # more only take memory
LOADER_PROCESSES = 4


class StopRequest:
    """Remembers a signal that asks the run to end, so that the loop saves and ends.

    A second Ctrl-C ends at once. It must come some seconds later, because torchrun sends its processes the first Ctrl-C
    again. What is ignored at the start stays so: Ctrl-C in the background of a script, and SIGHUP under nohup.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = math.inf
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and time.monotonic() > self._since + SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED_BY_SIGNAL


def run_loop(
    training: Training,
    dataset: PairedFolder,
    run: RunFolder,
    unlabelled: Sequence[ImageFolder] = (),
) -> None:
    """Take the remaining steps. Write metrics, previews and checkpoints."""
    machine, batch_size = training.machine, training.config.optimiser.global_batch_size
    training.total_steps = total = training.steps_in_all(len(dataset))
    labelled_share = 1 - training.config.train.unlabelled_share if unlabelled else 1.0
    epochs = labelled_share * (training.images_seen + (total - training.step) * batch_size) / len(dataset)
    logger.info("%d steps of %d images (%.1f epochs)", total, batch_size, epochs)
    previews = Previews(dataset, training) if machine.is_main else None
    cut_short = training.step > 0 and preview_is_due(training) and not run.preview_path(training.step).exists()
    if previews is not None and cut_short:  # killed between a checkpoint and its preview
        save_preview(previews, run, training.step)
    if training.step >= total:
        has_own = machine.from_main(run.checkpoint_path(training.step).is_file(), "look for the last checkpoint")
        if not has_own:  # it came from another run
            save(training, run, last=True)
        logger.info(
            "nothing left to do: the run is at step %d of %d; the checkpoint to sample from is %s",
            training.step, total, run.checkpoint_path(training.step),
        )  # fmt: skip
        export_weights(training, run)
        return
    source = mix(training, dataset, unlabelled)
    if training.config.train.wandb:
        wandb_utils.start_run(run.path, run.path.name, training.record)
    take_steps(training, source, run, previews)
    export_weights(training, run)
    machine.barrier("write the last files")
    wandb_utils.finish()
    logger.info("done: %d steps; the checkpoint to sample from is %s", total, run.checkpoint_path(total))


def take_steps(
    training: Training, source: PairedFolder | LatentPairs | Mixture, run: RunFolder, previews: Previews | None
) -> None:
    """Take the steps. After a signal, save a checkpoint and end the process with the exit code of the signal."""
    machine, settings, total = training.machine, training.config.train, training.total_steps
    stop = StopRequest()
    machine.barrier("draw a preview, or start wandb")
    clock = WaitingClock(machine.device)
    bar = tqdm(
        clock.watch(step_batches(source, training)),
        initial=training.step, total=total, unit="step", disable=not (machine.is_main and sys.stderr.isatty()),
    )  # fmt: skip
    started, steps_before = time.perf_counter(), training.step
    for batch in bar:
        machine.progress()  # the batch is there
        training.train_step(batch)
        step, last = training.step, training.step == total
        if step % settings.log_every == 0 or last:
            log_progress(training, run, step - steps_before, started, clock)
            started, steps_before = time.perf_counter(), step
        stopped = machine.any_rank(stop.signal is not None) and not last
        if step % settings.ckpt_every == 0 or last or stopped:
            saved = save(training, run, last)
        if previews is not None and preview_is_due(training) and not stopped:
            save_preview(previews, run, step)
        if step % settings.ckpt_every == 0 or last or stopped or preview_is_due(training):
            machine.barrier(f"save what step {step} gave")  # saving may take longer than the limit of an exchange
        if stopped:
            where = "" if saved else " from the last checkpoint"
            logger.warning("signal received: leaving at step %d; the same command continues%s", step, where)
            wandb_utils.finish(stop.exit_code)
            sys.exit(stop.exit_code)


def mix(
    training: Training, dataset: PairedFolder, unlabelled: Sequence[ImageFolder]
) -> PairedFolder | LatentPairs | Mixture:
    """The data set of the steps: labelled pairs, or a mixture with unlabelled images and looks."""
    encoded = encode_once([dataset, *unlabelled], training)
    labelled: PairedFolder | LatentPairs = encoded[0] if encoded else dataset
    others: Sequence[Source] = encoded[1:] if encoded else unlabelled
    if training.looks is None and not others:
        return labelled
    config = training.config
    pseudo_masks = bool(config.train.unlabelled_mask_path)
    soft = pseudo_masks or not dataset.rule.is_hard
    return Mixture(labelled, others, training.looks, config.data.num_classes, config.optimiser.seed, pseudo_masks, soft)


def encode_once(sources: Sequence[ImageFolder], training: Training) -> list[LatentPairs] | None:
    """The images of all sources as latents, encoded now if they are missing. None if each step encodes its images.

    A batch mixes the sources, so either all are encoded or none is.
    """
    machine, space, settings = training.machine, training.space, training.config.train
    if not isinstance(space, LatentSpace) or settings.latent_cache == NO_CACHE:
        return None
    if training.config.data.crop != "center":
        logger.info("images are encoded at each step: windows of random crops are always new")
        return None
    images = training.total_steps * training.config.optimiser.global_batch_size
    if settings.latent_cache is None and images < SYMMETRIES * sum(map(len, sources)):
        logger.info("images are encoded at each step: the run is too short to gain from a cache of all views")
        return None
    folder = Path(settings.latent_cache or settings.results_dir / "latents")
    encoded = []
    for source in sources:
        hashes = machine.from_main(source.image_hashes if machine.is_main else None, "hash the images")
        encoded.append(LatentPairs(source, space, folder, hashes))
        with naming_checkpoint(training.cache_named_by if settings.latent_cache else None, "latent_cache"):
            encoded[-1].prepare(machine)
    return encoded


def step_batches(source: PairedFolder | LatentPairs | Mixture, training: Training) -> Iterator[Batch]:
    """Batches of the remaining steps, loaded in the background.

    By default, loader processes start if one thread may be too slow: if files are read again at each access, and if
    images in memory feed a GPU.
    """
    machine, optimiser = training.machine, training.config.optimiser
    steps = range(training.step, training.total_steps)
    keys = StepBatches(
        len(source), optimiser.global_batch_size, steps, optimiser.seed,
        machine.rank, machine.world_size, training.images_seen,
        num_unlabelled=source.num_unlabelled if isinstance(source, Mixture) else 0,
        unlabelled_share=training.config.train.unlabelled_share,
        groups=training.groups if training.config.train.balance_groups else (),
    )  # fmt: skip
    workers = training.config.train.num_workers
    if workers is None:
        first = source.sources[0] if isinstance(source, Mixture) else source
        light = isinstance(first, LatentPairs) or machine.device.type == "cpu"
        workers = 0 if source.in_memory and light else LOADER_PROCESSES
    loader = make_loader(source, keys, limit_workers(workers), pin_memory=machine.device.type == "cuda")
    return prefetch(loader, training.prepare_batch)


def limit_workers(asked: int) -> int:
    """Number of loader processes to start: at most ``MOST_LOADERS_PER_CORE`` per core."""
    most = MOST_LOADERS_PER_CORE * usable_cores()
    if asked > most:
        logger.warning("num_workers %d: %d are started, %d per core", asked, most, MOST_LOADERS_PER_CORE)
    return min(asked, most)


def save(training: Training, run: RunFolder, last: bool) -> bool:
    """Save a checkpoint, and say whether that was done. All ranks must call this together.

    If the latest step was skipped, only the end of the run is saved. Weights can be finite and still give no finite
    gradient any more. A continued run then starts from the checkpoint before.
    """
    training.check_finite(run)
    if training.skipped_in_a_row.item() and not last:
        logger.warning("step %d was skipped (not finite): no checkpoint now", training.step)
        return False
    state = training.state()
    if training.machine.is_main:
        logger.info("saved %s", run.save(state))
    return True


def export_weights(training: Training, run: RunFolder) -> None:
    """Write the averaged weights as one file for sharing, if asked for."""
    if training.config.train.export_safetensors and training.machine.is_main:
        export_safetensors(run.path / "model.safetensors", training.trained_state())
        logger.info("exported %s", run.path / "model.safetensors")


def log_progress(training: Training, run: RunFolder, steps: int, started: float, clock: WaitingClock) -> None:
    """Write the metrics since the last line, and stop a run that has diverged. All ranks must call this together.

    Args:
        steps: number of steps since the last line.
        started: when they began, as ``time.perf_counter`` says it.
        clock: knows how long this process waited for their data.
    """
    metrics = training.read_metrics()  # waits for the device, so that the time of all its work counts
    seconds = time.perf_counter() - started
    metrics["speed/images_per_sec"] = steps * training.config.optimiser.global_batch_size / seconds
    metrics["speed/waiting_share"] = training.machine.max_over_ranks(clock.read_seconds() / seconds)
    if training.machine.is_main:
        record_metrics(training, run, metrics)
    training.check_finite(run)


def record_metrics(training: Training, run: RunFolder, metrics: dict[str, float]) -> None:
    """Write metrics to metrics.jsonl, then to the log, then to wandb."""
    step, total, lr = training.step, training.total_steps, training.optimizer.param_groups[0]["lr"]
    metrics = {**metrics, "train/lr": lr}
    run.log_metrics({"step": step, **metrics})
    speed, waiting = metrics["speed/images_per_sec"], metrics["speed/waiting_share"]
    left = (total - step) * training.config.optimiser.global_batch_size / speed
    notes = f", {100 * waiting:.0f}% of the time waiting for data" if waiting >= WAITING_WORTH_SAYING else ""
    if metrics["train/skipped_steps"]:
        notes += f", {metrics['train/skipped_steps']:.0f} steps skipped (not finite)"
    logger.info(
        "step %d of %d: loss %.4f, gradient norm %.3f, lr %.2e, %.1f images/s, %s left%s",
        step, total, metrics["train/loss"], metrics["train/grad_norm"], lr, speed,
        duration(left), notes,
    )  # fmt: skip
    wandb_utils.log(metrics, step)


def preview_is_due(training: Training) -> bool:
    return training.step % training.config.train.sample_every == 0 or training.step >= training.total_steps


def save_preview(previews: Previews, run: RunFolder, step: int) -> None:
    """Draw and write the preview of a step. If its samples are not finite, warn: the training goes on."""
    try:
        picture, grid = previews.draw()
    except FloatingPointError as error:
        logger.warning("no preview of step %d: %s", step, error)
        return
    if grid is not None:  # before the picture, because RunFolder.cut_metrics drops a line without its picture
        run.log_metrics({"step": step, PREVIEW_GRID: grid})
    path = run.preview_path(step)
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))
    logger.info("preview: %s", path)
    if grid is not None:
        wandb_utils.log({PREVIEW_GRID: grid}, step)
    wandb_utils.log_image("preview", path, step)
