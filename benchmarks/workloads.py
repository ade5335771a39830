"""Work that the benchmark times: a training step and a batch of samples. Each optimisation has its own switch."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import sit_flops, synchronize
from common.pictures import to_uint8
from dataset.batches import Batch, StepBatches, WaitingClock, make_loader, prefetch
from dataset.config import DataConfig
from dataset.files import encode_image
from dataset.folders import PairedFolder
from dataset.mask_folder import MaskFolder
from dataset.masks import to_prob_map
from engine.autoencoder import LatentSpace, Space
from engine.loop import LOADER_PROCESSES
from engine.machine import Machine, has_compiler
from engine.sampling import ImageSampler, SamplingSettings
from engine.training import update_ema
from layers.mask import MaskCondition
from layers.rows import MaskRows, mask_rows
from models import SiT, SiT_models, patch_size
from transport import Transport, create_transport

NUM_CLASSES = 2
LATENT_CHANNELS, LATENT_FACTOR = 4, 8
PAIRS = 64  # of the drawn data set


@dataclass(frozen=True)
class Mode:
    """One way to train and to sample. The defaults are this project's, and every field can be turned off alone."""

    bf16: bool = True  # else float32 (TF32 where the GPU has it)
    cached_latents: bool = True  # else the autoencoder encodes in every step
    distinct_rows: bool = True  # else the modulation is computed for every token
    fused_adamw: bool = True
    foreach_ema: bool = True  # else a Python loop over the parameters
    no_sync: bool = True  # else the loss is read at every step
    background_batches: bool = True  # else a batch is fetched when it is asked for
    plain_attention: bool = True  # on a CPU in bf16, see SiT.use_plain_attention
    compiled: bool = True
    fixed_solver: bool = True  # the default solver; else dopri5 at atol 1e-6, rtol 1e-3
    single_when_unguided: bool = True  # else both halves are computed at guidance 1, too
    background_writers: bool = True  # else the main thread encodes the PNGs
    decode_in_chunks: bool = True
    weights_rounded_once: bool = True  # else autocast rounds them at every call
    one_condition_per_image: bool = False  # no way of ours: what the modulation would cost without masks


AS_SIT = Mode(**dict.fromkeys((field.name for field in fields(Mode)), False))
TRAINING_SWITCHES = (
    "bf16", "cached_latents", "distinct_rows", "fused_adamw", "foreach_ema", "no_sync", "background_batches",
    "plain_attention", "compiled",
)  # fmt: skip
SAMPLING_SWITCHES = (
    "bf16", "weights_rounded_once", "distinct_rows", "fixed_solver", "single_when_unguided", "background_writers",
    "decode_in_chunks", "compiled",
)  # fmt: skip


def modes_of(ours: Mode, switches: tuple[str, ...], space: Space) -> dict[str, Mode]:
    """Ours, SiT's way, ours with each switch turned alone, and ours with one condition per image."""
    only_latents = () if isinstance(space, LatentSpace) else ("cached_latents", "decode_in_chunks")
    modes = {"ours": ours, "as-sit": AS_SIT}
    if "fixed_solver" in switches:
        modes["as-sit, our solver"] = replace(AS_SIT, fixed_solver=True)  # the same number of network calls
    for name in switches:
        on = getattr(ours, name)
        if name in only_latents or (name == "compiled" and not on and not has_compiler()):
            continue
        modes[f"{'without' if on else 'with'} {name.replace('_', ' ')}"] = replace(ours, **{name: not on})
    return modes | {"one condition per image": replace(ours, one_condition_per_image=True, distinct_rows=False)}


@dataclass(frozen=True)
class Setup:
    """A network and its data."""

    model: str
    image_size: int
    latents: bool  # else pixels
    batch: int
    steps: int = 1  # optimiser steps, or solver steps, that are timed at once
    brief: bool = False  # only ours, the baseline, and a modulation per token

    @property
    def name(self) -> str:
        space = "latents" if self.latents else "pixels"
        return f"{self.model}, {self.image_size} px, {space}, batch {self.batch}"

    def build(self, device: torch.device, num_classes: int = NUM_CLASSES) -> SiT:
        """The network, with weights off their start."""
        factor, channels = (LATENT_FACTOR, LATENT_CHANNELS) if self.latents else (1, 3)
        with torch.device(device):
            torch.manual_seed(0)
            model = SiT_models[self.model](
                input_size=self.image_size // factor, in_channels=channels, num_classes=num_classes,
                mask_pixels=patch_size(self.model) * factor,
            )  # fmt: skip
            move_off_start(model)
        return model.to(device)  # the positions are computed on the CPU

    def transport(self) -> Transport:
        """The velocity, which the training command chooses for these networks."""
        return create_transport()


@torch.no_grad()
def move_off_start(model: SiT) -> None:
    """Change all weights a little. At their start, half of the network would multiply zeros."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def sd_autoencoder(device: torch.device) -> LatentSpace:
    """Stable Diffusion's autoencoder with random weights: its time does not depend on them.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import AutoencoderKL  # seconds to import

    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, layers_per_block=2, latent_channels=LATENT_CHANNELS, sample_size=256,
        scaling_factor=0.18215,
    )  # fmt: skip
    return LatentSpace(vae.eval().requires_grad_(False), "random weights").to(device)


# --------------------------------------------------------------------------------------------------------------- data


def draw_masks(count: int, size: int, seed: int = 0, num_classes: int = NUM_CLASSES) -> np.ndarray:
    """(count, size, size) uint8 class maps: disks of the size that nuclei have at 256 px, covering about a fifth."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((size, size))
    maps = np.zeros((count, size, size), np.uint8)
    for one in maps:
        for _ in range(12):
            row, column, radius = *rng.uniform(0, size, 2), rng.uniform(0.04, 0.1) * size
            one[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = rng.integers(1, num_classes)
    return maps


def write_pairs(folder: Path, size: int) -> tuple[Path, Path]:
    """PAIRS drawn images and masks as PNG files."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    rng = np.random.default_rng(0)
    for number, mask in enumerate(draw_masks(PAIRS, size)):
        gray = np.where(mask, 200, 40)[..., None] + rng.normal(0, 10, (size, size, 3))
        Image.fromarray(gray.clip(0, 255).astype(np.uint8)).save(images / f"{number:03d}.png")
        Image.fromarray(mask * 255).save(masks / f"{number:03d}.png")
    return images, masks


class CachedLatents(Dataset):
    """Posterior means and standard deviations in memory, with masks; random numbers, since time is all that counts."""

    def __init__(self, setup: Setup) -> None:
        side = setup.image_size // LATENT_FACTOR
        self.mean = torch.randn(PAIRS, LATENT_CHANNELS, side, side)
        self.std = torch.full_like(self.mean, 0.1)
        self.masks = torch.from_numpy(draw_masks(PAIRS, setup.image_size))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, _ = key
        return {"mean": self.mean[index], "std": self.std[index], "mask": self.masks[index]}


def first_masks(folder: Path, config: DataConfig, count: int) -> Tensor:
    """(n, K, S, S) class probabilities of the first masks of a folder, n at most ``count``."""
    masks = MaskFolder(folder, config)
    return torch.stack([torch.as_tensor(masks.load(name).prob_map) for name in masks.names[:count]])


# ----------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Timing:
    """Time of one block of steps, or of one batch of samples."""

    seconds: float  # per step, or per batch
    waiting: float = 0.0  # share of the time
    memory_gib: float = 0.0  # peak; of the whole process on a CPU
    flops: int = 0  # arithmetic per step, or per batch
    calls: int = 0  # of the network, in sampling


class TrainingBench:
    """Training steps of one network. All modes share its weights, so that they fit the memory together.

    Args:
        space: where the images are; an autoencoder, or None, for latents.
        folder: an empty folder for the data set.
    """

    def __init__(self, setup: Setup, machine: Machine, space: Space | None, folder: Path) -> None:
        self.setup, self.machine, self.space = setup, machine, space
        self.model = setup.build(machine.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.wrapped: nn.Module = self.model
        self._twins: dict[bool, SiT] = {}  # with plain attention, and without
        self.transport = setup.transport()
        images = PairedFolder(*write_pairs(folder, setup.image_size), DataConfig(setup.image_size))
        self.datasets = {False: images, True: CachedLatents(setup) if setup.latents else images}
        self.rows: list[int] = []

    def network(self, mode: Mode) -> nn.Module:
        """The network with the attention of the mode, or a compiled twin of it with the same parameters."""
        plain = mode.plain_attention and mode.bf16 and self.machine.device.type == "cpu"
        if not mode.compiled:
            self.model.use_plain_attention(plain)
            return self.wrapped
        if plain not in self._twins:
            kept = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
            self._twins[plain] = model = copy.deepcopy(self.model, kept)
            model.use_plain_attention(plain)
            model.compile_blocks()
        return self._twins[plain]

    def batches(self, mode: Mode, steps: int) -> Iterator[Batch]:
        """The loader of the training command, with or without its background thread."""
        machine = self.machine
        batch = self.setup.batch * machine.world_size
        keys = StepBatches(PAIRS, batch, range(steps), 0, machine.rank, machine.world_size)
        dataset, on_gpu = self.datasets[mode.cached_latents], machine.device.type == "cuda"
        workers = LOADER_PROCESSES if on_gpu and dataset is self.datasets[False] else 0  # as the training command
        loader = make_loader(dataset, keys, workers, pin_memory=on_gpu)

        def prepare(batch: Batch) -> Batch:
            if mode.distinct_rows:
                batch["rows"] = mask_rows(batch["mask"], NUM_CLASSES, self.model.grid)
                self.rows.append(len(batch["rows"].shares))
            return batch

        return prefetch(loader, prepare) if mode.background_batches else map(prepare, loader)

    def __call__(self, mode: Mode) -> Timing:
        """Time a block of steps, after two that are not timed."""
        device, steps = self.machine.device, self.setup.steps
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=mode.fused_adamw)
        clock = WaitingClock(device)
        self.rows = []
        for number, batch in enumerate(clock.watch(self.batches(mode, steps + 2))):
            if number == 2:
                synchronize(device)
                clock.read_seconds()
                reset_peak_memory(device)
                started = time.perf_counter()
            self.step(mode, batch, optimizer)
        synchronize(device)
        seconds = time.perf_counter() - started
        return Timing(seconds / steps, clock.read_seconds() / seconds, peak_memory_gib(device), self.flops(mode))

    def step(self, mode: Mode, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step."""
        device, network = self.machine.device, self.network(mode)
        names = {"image", "mean", "std"} & set(batch)
        images = {name: batch[name].to(device, non_blocking=True) for name in names}
        y = to_prob_map(batch["mask"].to(device, non_blocking=True), NUM_CLASSES)
        x1 = self.latents(mode, images)
        kwargs: dict[str, Tensor | MaskCondition | MaskRows | None]
        kwargs = {"y": y, "rows": batch["rows"].to(device) if mode.distinct_rows else None}

        def predict(x: Tensor, t: Tensor, y: Tensor, rows: MaskRows | None) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=mode.bf16):
                if mode.one_condition_per_image:
                    condition = self.model.embed_mask(y)
                    return network(x, t, MaskCondition(condition.embedding[:, :1], condition.detail)).float()
                return network(x, t, y, rows=rows).float()

        loss = self.transport.training_losses(predict, x1, kwargs)["loss"].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if mode.fused_adamw:  # with the clipping and skipping of the training command, which SiT has not
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            vars(optimizer).update(grad_scale=None, found_inf=(~torch.isfinite(norm)).float())
        optimizer.step()
        if mode.foreach_ema:
            update_ema(self.ema, self.model, 0.9999, 1000)
        else:
            with torch.no_grad():
                for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                    average.mul_(0.9999).add_(weight, alpha=1e-4)
        if not mode.no_sync:
            loss.item()

    def latents(self, mode: Mode, images: dict[str, Tensor]) -> Tensor:
        """What the network is trained on: a new draw from the cached posterior, or what the space makes of images."""
        if "mean" in images:
            return images["mean"] + images["std"] * torch.randn_like(images["std"])
        if self.space is None:
            raise ValueError("the mode without cached latents needs an autoencoder")
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=mode.bf16):
            return self.space.encode(images["image"]).float()

    def flops(self, mode: Mode) -> int:
        """Arithmetic of one step on this rank, an autoencoder's included."""
        batch, tokens = self.setup.batch, self.model.pos_embed.shape[1]
        rows = round(sum(self.rows) / len(self.rows)) if mode.distinct_rows else batch * tokens
        rows = batch if mode.one_condition_per_image else rows
        total = sit_flops(self.model, batch, rows).training
        if isinstance(self.space, LatentSpace) and not mode.cached_latents:
            total += batch * encoder_flops(self.space, self.setup.image_size)
        return total


@lru_cache
def encoder_flops(space: LatentSpace, size: int) -> int:
    """FLOP to encode one image, counted on tensors without content."""
    empty: Any = copy.deepcopy(space.vae).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty.encode(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------- sampling


class SwitchedSampler(ImageSampler):
    """The sampler with only the optimisations of a mode."""

    def __init__(self, model: SiT, transport: Transport, space: Space, machine: Machine, guidance: float, mode: Mode,
                 steps: int) -> None:  # fmt: skip
        solver = {"num_steps": steps} if mode.fixed_solver else {"method": "dopri5"}
        settings = SamplingSettings(cfg_scale=guidance, **solver)
        machine = replace(machine, precision="bf16" if mode.bf16 else "float32")
        super().__init__(model, transport, space, machine, settings, compiled=mode.compiled)
        self.mode = mode

    def _condition(self, prob_maps: Tensor, looks: Tensor | None = None, keep: bool = True) -> MaskCondition:
        if self.mode.distinct_rows and not self.mode.one_condition_per_image:
            return super()._condition(prob_maps, looks, keep)
        with self.machine.autocast():
            condition = self.model.embed_mask(prob_maps.to(self.machine.device))
        if self.mode.one_condition_per_image:
            return MaskCondition(condition.embedding[:, :1], condition.detail)
        return condition

    def _predict(self, x: Tensor, t: Tensor, y: MaskCondition) -> Tensor:
        if self.settings.cfg_scale != 1 or self.mode.single_when_unguided:
            return super()._predict(x, t, y)
        with self.machine.autocast():
            both = y.with_null(self.model.y_embedder.null())
            return self.model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)[0].float()


class SamplingBench:
    """Batches of images from masks to files.

    Args:
        setup: network and data; ``steps`` are the solver's.
        space: where the images are.
        folder: an empty folder for the images.
        model: a trained network instead of one with random weights.
    """

    def __init__(
        self, setup: Setup, machine: Machine, space: Space, folder: Path, guidance: float, model: SiT | None = None
    ) -> None:
        self.setup, self.machine, self.space, self.folder, self.guidance = setup, machine, space, folder, guidance
        self.model = (model or setup.build(machine.device)).eval().requires_grad_(False)
        self.transport = setup.transport()
        class_maps = torch.from_numpy(draw_masks(setup.batch, setup.image_size))
        self.prob_maps = to_prob_map(class_maps, NUM_CLASSES)
        self.samplers: dict[Mode, SwitchedSampler] = {}

    def sampler(self, mode: Mode) -> SwitchedSampler:
        if mode not in self.samplers:
            rounded = mode.bf16 and mode.weights_rounded_once
            model = copy.deepcopy(self.model) if mode.compiled or rounded else self.model
            if rounded:
                model.keep_weights_in(torch.bfloat16)
            self.samplers[mode] = SwitchedSampler(
                model, self.transport, self.space, self.machine, self.guidance, mode, self.setup.steps
            )
        return self.samplers[mode]

    @torch.inference_mode()
    def __call__(self, mode: Mode) -> Timing:
        """Time two batches, so that the files of one are written while the next is drawn."""
        sampler, size, device = self.sampler(mode), self.setup.batch, self.machine.device
        if isinstance(self.space, LatentSpace):
            self.space.chunk_size = 8 if mode.decode_in_chunks else size
        if mode.compiled:
            sampler(self.prob_maps, list(range(size)))
        synchronize(device)
        reset_peak_memory(device)
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as writers:
            for number in range(2):
                images = sampler(self.prob_maps, list(range(number * size, (number + 1) * size)))
                for index, image in enumerate(images):
                    path, pixels = self.folder / f"{number}_{index}.png", to_uint8(image)
                    if mode.background_writers:
                        writers.submit(write_image, path, pixels)
                    else:
                        write_image(path, pixels)
        seconds = (time.perf_counter() - started) / 2
        return Timing(seconds, 0.0, peak_memory_gib(device), self.flops(mode, sampler.nfe), sampler.nfe)

    def flops(self, mode: Mode, calls: int) -> int:
        """Arithmetic of the network for one batch; the decoder is left out."""
        doubled = self.guidance != 1 or not mode.single_when_unguided
        batch, tokens = self.setup.batch * (2 if doubled else 1), self.model.pos_embed.shape[1]
        condition = self.sampler(mode)._condition(self.prob_maps)
        rows = batch * tokens
        if condition.row_of_token is not None:
            rows = len(condition.embedding) + (64 if doubled else 0)
        elif mode.one_condition_per_image:
            rows = batch
        return calls * sit_flops(self.model, batch, rows, with_mask=False).forward


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(encode_image(pixels))


# ------------------------------------------------------------------------------------------------------------- memory


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory. On a CPU, this resets the peak of the process if Linux allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        try:
            clear.write_text("5")
        except OSError:
            return


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since ``reset_peak_memory``, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if Path("/proc/self/status").exists():
        return process_memory("VmHWM") / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def process_memory(name: str) -> int:
    """Bytes of this process on Linux: ``VmRSS`` for those in memory now, ``VmHWM`` for their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
