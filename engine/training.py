"""The state of one run, and one training step. ``engine.loop`` takes the steps."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import InputError
from common.faults import short_line
from common.patch_grid import grid_ratio
from common.pictures import captioned_sheet, mask_picture
from common.plain import WRONG
from common.randomness import seed_step
from common.spread import evenly
from dataset.batches import Batch
from dataset.checks import for_all
from dataset.folders import PairedFolder
from dataset.gray import SourceIntensity
from dataset.looks import Looks, kept_images, measure_tensor
from dataset.masks import to_prob_map
from dataset.unlabelled import ImageFolder, UnlabelledFolder
from download import PUBLISHED_URLS, find_weights
from engine.autoencoder import LatentSpace, Space, space_config
from engine.checkpoint import check_moments, check_numbers
from engine.config import RunConfig
from engine.init_from import adapt_sit_weights, meaning_warnings
from engine.machine import Machine
from engine.run_folder import RunFolder
from engine.sampling import ImageSampler, SamplingSettings, image_seed
from layers.rows import MaskRows, mask_rows
from layouts.recombine import read_origin
from models import SiT, build_model
from transport import Transport, create_transport

logger = logging.getLogger(__name__)
MOST_SKIPPED_IN_A_ROW = 20
PREVIEWS = 4  # examples in a preview


class Training:
    """Model, EMA, optimiser and counters of one run: the content of a checkpoint, and the step that changes it.

    Args:
        groups: of the labelled and then of the unlabelled images; empty without groups.
        cache_named_by: the checkpoint, if it says where latents are kept.
    """

    def __init__(
        self, config: RunConfig, machine: Machine, space: Space, groups: Sequence[str] = (),
        cache_named_by: Path | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.machine = machine
        self.space = space
        torch.manual_seed(config.optimiser.seed)  # the same initial weights on every rank
        self.model: SiT = build_model(asdict(config.model)).to(machine.device)
        self.ema: SiT = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.wrapped: nn.Module = self.model
        self.transport: Transport = create_transport(**asdict(config.transport))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.optimiser.lr, weight_decay=config.optimiser.weight_decay, fused=True
        )
        self.step = 0
        self.images_seen = 0  # over all processes
        self.total_steps = 0
        self.trained_on: list[str] | None = None  # SHA-256 of every training image, if known
        self.labelled_on: list[str] | None = None  # SHA-256 of images whose labels it may know, also via a segmenter
        self.intensity: dict[str, Any] | None = None  # SourceIntensity of the training images
        self.mask_type: str | None = None  # how the labelled masks are read
        self.looks: Looks | None = None  # of the training images, if the model knows looks
        self.groups, self.cache_named_by = groups, cache_named_by
        self.sums = torch.zeros(3, dtype=torch.float64, device=machine.device)  # loss, gradient norm, skipped steps
        self.since_log = 0
        self.share_rows = not self._on_cpu_in_bf16  # there, sharing rows gains nothing
        self.skipped_in_a_row = torch.zeros((), dtype=torch.float64, device=machine.device)

    @property
    def record(self) -> dict[str, Any]:
        """The configuration, the space and the machine, as plain types."""
        return {
            **self.config.to_dict(),
            "space": space_config(self.space),
            "machine": self.machine.describe(),
        }

    def trained_state(self) -> dict[str, Any]:
        """The part of a checkpoint that sampling and evaluation need. An export has the same part."""
        return {
            "ema": self.ema.state_dict(),
            "step": self.step,
            "config": self.record,
            "trained_on": self.trained_on,
            "labelled_on": self.labelled_on,
            "intensity": self.intensity,
            "looks": None if self.looks is None else self.looks.to_dict(),
            "mask_type": self.mask_type,
        }

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint. All ranks must call this together, because each has its own sums of metrics."""
        return {
            **self.trained_state(),
            "model": self.model.state_dict(),
            "opt": self.optimizer.state_dict(),
            "images_seen": self.images_seen,
            "sums": self.machine.from_all(self.sums.cpu()),
            "since_log": self.since_log,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load weights, optimiser and counters of a checkpoint.

        Raises:
            InputError: the checkpoint does not fit this run.
        """
        try:
            self._load(state)
        except (*WRONG, RuntimeError) as error:
            raise InputError(
                f"the checkpoint does not fit this run ({short_line(error)}). Give another one."
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        for part in ("model", "ema"):
            check_numbers(state[part])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        options = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["opt"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # options of this start: the weight decay may have changed
        check_moments(self.optimizer)
        self.step = state["step"]
        self.images_seen = state["images_seen"]
        self.trained_on, self.labelled_on = state.get("trained_on"), state.get("labelled_on")
        self.looks = Looks.from_dict(state["looks"]) if state.get("looks") else None
        sums = state["sums"]  # of every rank of the run that saved them
        check_numbers({"sums": sums})
        if sums.ndim != 2 or len(sums) < 1 or sums.shape[1:] != self.sums.shape:
            raise ValueError(f"sums have the shape {tuple(sums.shape)}")
        same_ranks = len(sums) == self.machine.world_size
        self.sums.copy_(sums[self.machine.rank] if same_ranks else sums.mean(0))
        self.since_log = state["since_log"]

    def start_from(self, source: str) -> list[str]:
        """Load the weights of another run or of published SiT. Returns a report of kept and new weights."""
        found = find_weights(source)
        weights, report = adapt_sit_weights(found.state_dict, self.model)
        self.model.load_state_dict(weights)
        self.ema.load_state_dict(weights)
        return report.lines() + meaning_warnings(found.config, self.config)

    def note_images(self, labelled: PairedFolder, unlabelled: Sequence[ImageFolder]) -> None:
        """Record how images and masks are read, and which images the model has seen, so that leaks can be found."""
        self.mask_type = labelled.rule.mask_type
        self.intensity = SourceIntensity.of(
            labelled.windows, labelled.dtypes, labelled.stored_channels, labelled.colours
        ).to_dict()
        self._note_seen(labelled, unlabelled)

    def _note_seen(self, labelled: PairedFolder, unlabelled: Sequence[ImageFolder]) -> None:
        """Record the images that the model has seen.

        They are unknown if the run started from the weights of another run. Published weights have seen ImageNet only.
        """
        before, source = self.trained_on, self.config.train.init_from
        if (source is not None and Path(source).name not in PUBLISHED_URLS) or (self.step > 0 and before is None):
            return
        images = {one for folder in (labelled, *unlabelled) for one in folder.image_hashes}
        if before is not None and images != set(before):
            logger.warning("changed on resume: the images are others than before (%d now)", len(images))
        self.trained_on = sorted(images.union(before or ()))
        if self.step == 0 or self.labelled_on is not None:
            labels = {one for folder in (labelled, *unlabelled) for one in _labels_behind(folder, labelled)}
            self.labelled_on = sorted(labels.union(self.labelled_on or ()))

    def measure_looks(self, labelled: PairedFolder, unlabelled: Sequence[ImageFolder]) -> None:
        """Measure the looks of all images, for a model that knows looks. A continued run keeps those it began with."""
        if not self.config.model.look_numbers:
            if unlabelled:
                logger.warning("unlabelled images, but a model without looks: masks will not take their look")
            return
        if self.looks is not None:
            return
        images = [(folder, i, name) for folder in (labelled, *unlabelled) for i, name in enumerate(folder.names)]
        kept = kept_images(len(images), self.groups)
        chosen = [images[number] for number in kept]
        groups = [self.groups[number] for number in kept] if self.groups else []
        windows = for_all(lambda one: one[0].look_windows(one[1]), chosen, "measuring looks", self.machine.is_main)
        self.looks = Looks.of([name for *_, name in chosen], list(windows), groups)
        logger.info("looks of %d images: %d numbers each", len(chosen), self.config.model.look_numbers)

    @property
    def _on_cpu_in_bf16(self) -> bool:
        return self.machine.device.type == "cpu" and self.machine.precision == "bf16"

    def prepare_model(self) -> None:
        """Set up compilation, recomputation and distribution. The averaged model is a copy and does not change."""
        self.model.recompute = self.config.train.recompute_activations
        self.model.rest_plain_patches()
        if self._on_cpu_in_bf16:
            self.model.use_plain_attention()
        if self.config.train.compile:
            self.model.compile_blocks()
        self.machine.barrier("read the data and the weights")
        if self.machine.world_size > 1:
            device_ids = [self.machine.device.index] if self.machine.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(
                self.model, device_ids=device_ids, gradient_as_bucket_view=True, **without_broadcast()
            )

    def prepare_batch(self, batch: Batch) -> Batch:
        """Find the distinct rows of hard masks, for every part of the batch. Runs in the background on the CPU."""
        if self.share_rows and not batch["mask"].is_floating_point():
            parts = batch["mask"].chunk(self.config.optimiser.accumulate)
            batch["rows"] = [mask_rows(part, self.config.model.num_classes, self.model.grid) for part in parts]
        return batch

    def lr_factor(self) -> float:
        """Factor on the learning rate: rises over the warm-up, stays 1, and falls linearly over the cool-down."""
        optimiser = self.config.optimiser
        warmup = (self.step + 1) / max(1, optimiser.warmup_steps)
        cooldown = (self.total_steps - self.step) / max(1, optimiser.cooldown_steps)
        return min(1.0, warmup, cooldown)

    def train_step(self, batch: Batch) -> None:
        """Take one optimiser step on this rank's part of the batch. Does not wait for the device."""
        optimiser = self.config.optimiser
        seed_step(optimiser.seed, self.step, self.machine.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = optimiser.lr * self.lr_factor()
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate_gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), optimiser.grad_clip or math.inf)
        # The fused optimiser skips a step with a non-finite gradient. All ranks have the same gradient. The number is
        # not read here, so nothing waits for the device. torch.amp.GradScaler uses the same protocol.
        bad = (~torch.isfinite(norm)).float()
        vars(self.optimizer).update(grad_scale=None, found_inf=bad)
        self.optimizer.step()
        update_ema(self.ema, self.model, optimiser.ema_decay, self.step)
        good = 1 - bad
        self.sums += torch.stack([torch.nan_to_num(loss) * good, torch.nan_to_num(norm) * good, bad])
        self.skipped_in_a_row.copy_((self.skipped_in_a_row + 1) * bad)
        self.step += 1
        self.images_seen += optimiser.global_batch_size
        self.since_log += 1

    def _accumulate_gradients(self, batch: Batch) -> Tensor:
        """Gradient of the mean loss, part by part. Returns the loss.

        Random numbers are drawn for the whole batch. So the number of parts changes the memory, not the update. Ranks
        exchange gradients once, during the last part.
        """
        device, parts = self.machine.device, self.config.optimiser.accumulate
        x1 = self._to_latents(batch)  # (B, C, H, W)
        masks = to_prob_map(batch["mask"].to(device, non_blocking=True), self.config.model.num_classes)  # (B, K, S, S)
        t, x0 = self.transport.sample_times(len(x1), device), torch.randn_like(x1)
        kwargs = {"y": masks, **self._draw_conditions(batch)}
        chunks: dict[str, Sequence[Any]] = {name: tensor.chunk(parts) for name, tensor in kwargs.items()}
        if "rows" in batch:
            chunks["rows"] = [found.to(device) for found in batch["rows"]]
        total = torch.zeros((), device=device)
        tensors = [tensor.chunk(parts) for tensor in (x1, t, x0)]
        shared = self.wrapped if isinstance(self.wrapped, DistributedDataParallel) else None
        for number, (x1_part, t_part, x0_part) in enumerate(zip(*tensors, strict=True), start=1):
            with shared.no_sync() if shared is not None and number < parts else nullcontext():
                part = {name: chunk[number - 1] for name, chunk in chunks.items()}
                losses = self.transport.training_losses(self._predict, x1_part, part, t=t_part, x0=x0_part)
                loss = losses["loss"].sum() / len(batch["mask"])
                loss.backward()
            total += loss.detach()
        return total

    def _draw_conditions(self, batch: Batch) -> dict[str, Tensor]:
        """Choose masks and looks to drop, (B,) bool each. Returns them with the looks (B, N), without missing ones."""
        device = self.machine.device
        found = {"drop": self.model.draw_dropped(len(batch["mask"]), device)}
        if "has_mask" in batch:
            without = ~batch["has_mask"].to(device, non_blocking=True)
            found["drop"] = without if found["drop"] is None else without | found["drop"]
        if "look" in batch:
            found["look"] = batch["look"].to(device, non_blocking=True)
            found["drop_look"] = self.model.draw_look_dropped(len(batch["mask"]), device)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _to_latents(self, batch: Batch) -> Tensor:
        """Images of a batch, or their encoded moments -> (B, C, H, W) float32."""
        device = self.machine.device
        if "moments" in batch:
            return LatentSpace.draw(*batch["moments"].to(device, non_blocking=True).unbind(1))
        with self.machine.autocast():
            return self.space.encode(batch["image"].to(device, non_blocking=True)).float()

    def _predict(self, x: Tensor, t: Tensor, y: Tensor, **conditions: Tensor | MaskRows) -> Tensor:
        with self.machine.autocast():
            return self.wrapped(x, t, y, **conditions).float()

    def read_metrics(self) -> dict[str, float]:
        """Mean metrics since the last call. Waits for the device; the steps do not."""
        sums = self.sums.clone()
        if self.machine.world_size > 1:
            dist.all_reduce(sums)
            sums /= self.machine.world_size
        loss, norm, skipped = sums.tolist()
        taken = max(1.0, self.since_log - skipped)
        self.sums.zero_()
        self.since_log = 0
        return {"train/loss": loss / taken, "train/grad_norm": norm / taken, "train/skipped_steps": skipped}

    def steps_in_all(self, num_images: int) -> int:
        """The step at which the run ends: ``max_steps``, or the step that completes ``epochs``.

        An epoch is one pass over the labelled images. Unlabelled images are added to them.
        """
        if self.config.train.unlabelled_path:
            num_images = math.ceil(num_images / (1 - self.config.train.unlabelled_share))
        optimiser = self.config.optimiser
        left = optimiser.epochs * num_images - self.images_seen
        return optimiser.max_steps or self.step + max(0, math.ceil(left / optimiser.global_batch_size))

    def check_finite(self, run: RunFolder) -> None:
        """Stop a run that has diverged, before it is saved.

        Raises:
            InputError: names step, learning rate and last checkpoint.
        """
        norms = torch._foreach_norm([*self.model.parameters(), *self.ema.parameters()])
        if self.skipped_in_a_row.item() >= MOST_SKIPPED_IN_A_ROW:
            problem = f"loss or gradient was not finite {MOST_SKIPPED_IN_A_ROW} times in a row"
        elif not torch.stack(norms).isfinite().all():
            problem = "weights have blown up"
        else:
            return
        steps, rate = run.steps(), self.config.optimiser.lr
        good = f"{run.checkpoint_path(steps[-1])} is good: run the same command" if steps else "Start again"
        no_step_was_good = self.skipped_in_a_row.item() >= self.step  # so the rate has changed no weight yet
        mend = self._mend_of_a_start() if no_step_was_good else "with a lower `lr`"
        message = f"step {self.step}: {problem} at learning rate {rate:g}. {good} {mend}."
        raise InputError(message)

    def _mend_of_a_start(self) -> str:
        """What to change if not even the first step had a finite gradient."""
        if self.config.train.compile:
            return "without `compile`"
        if self.machine.precision != "float32":
            return "with `precision` float32"
        return (
            "without `init_from`" if self.config.train.init_from else "with other images: evaluate.py data checks them"
        )


def _labels_behind(folder: ImageFolder, labelled: PairedFolder) -> list[str]:
    """SHA-256 of the images whose labels a folder's masks show.

    Pseudo-masks show the labels that taught their segmenter, if their settings say so. Else they may be true masks.
    """
    if isinstance(folder, UnlabelledFolder):
        return []
    origin = None if folder is labelled else read_origin(folder.pairs[0].mask_path.parent)
    return list((origin or {}).get("segmenter_images_sha256") or folder.image_hashes)


def without_broadcast() -> dict[str, Any]:
    """The argument of DistributedDataParallel that turns off the exchange of buffers. Training changes no buffers.

    torch 2.13 has a new name for it, and warns about the old one.
    """
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, all parameters in one fused call.

    The decay warms up as (1 + step) / (10 + step), so that a short run is not left with its initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Previews:
    """Fixed examples of the data, sampled again at every preview: rows of mask | real | generated."""

    def __init__(self, dataset: PairedFolder, training: Training) -> None:
        examples = [self._with_cells(dataset, index) for index in evenly(len(dataset), PREVIEWS)]
        self.images = torch.stack([example["image"] for example in examples])  # (n, C, S, S)
        masks = torch.stack([example["mask"] for example in examples])
        self.prob_maps = to_prob_map(masks, training.config.model.num_classes)  # (n, K, S, S)
        self.looks: Tensor | None = None
        if training.looks is not None:  # each preview has the look of the real image beside it
            found = [measure_tensor(image.numpy(), dataset.config) for image in self.images]
            self.looks = torch.from_numpy(training.looks.standardise(np.stack(found)))
        guided = training.model.class_dropout_prob > 0  # without dropped masks there is no guidance
        settings = SamplingSettings(cfg_scale=training.config.train.cfg_scale if guided else 1.0)
        self.sampler = ImageSampler(training.ema, training.transport, training.space, training.machine, settings)
        self.patch_pixels = training.model.patch_size * training.space.factor

    @staticmethod
    def _with_cells(dataset: PairedFolder, index: int, tries: int = 8) -> dict[str, Tensor]:
        """A view of the image that shows a cell, if a few tries find one."""
        for draw in range(tries):
            example = dataset.example(index, rng=np.random.default_rng((index, draw)))
            if example["mask"].dtype != torch.uint8 or example["mask"].any():
                break
        return example

    @torch.inference_mode()
    def draw(self) -> tuple[np.ndarray, float | None]:
        """Picture (H, W, 3) uint8, and the grid ratio of the generated images (1: patches do not show)."""
        seeds = [image_seed(0, index) for index in range(len(self.images))]
        generated = self.sampler(self.prob_maps, seeds, looks=self.looks)
        triples = zip(self.prob_maps, self.images, generated, strict=True)
        columns = [[mask_picture(mask), real, fake] for mask, real, fake in triples]
        picture = captioned_sheet(("mask", "real", "synthetic"), columns)
        pixels = generated.float().movedim(1, -1).cpu().numpy()  # (n, S, S, C)
        return picture, grid_ratio(list(pixels), self.patch_pixels)
