"""Latent cache: encode a training set once, as mean and standard deviation for all eight flips and quarter turns.

Encoding at each step can cost more than training a small model (benchmarks/speed_cpu.md). The cache keeps the posterior
of every turned or flipped image. So the flip and the random latent are still new at each step, as without a cache.

There is one file per image, ``FOLDER/KEY.safetensors``. The key depends on the autoencoder, the image file, and all
settings that turn it into a tensor. So a changed image, autoencoder or gray range is encoded again. Runs share equal
latents. An interrupted encoding continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from common.disk import write_bytes
from common.errors import InputError, one_line
from dataset.config import DataConfig
from dataset.unlabelled import ImageFolder
from dataset.views import SYMMETRIES, turn
from engine.autoencoder import LatentSpace
from engine.machine import Machine

logger = logging.getLogger(__name__)
READER = 1  # raise this if files are read, resized or scaled differently: older latents are then encoded again
MEMORY_GB = 4.0  # most memory for latents, per folder and process; beyond it, each access reads the file
NOT_ABOUT_IMAGES = ("num_classes", "mask_values")


class LatentPairs(torch.utils.data.Dataset):
    """The pairs of a ``PairedFolder`` with centred crops. Images are replaced by the moments of their latents.

    Args:
        pairs: the data set. It chooses the same flips and turns as without a cache.
        space: the autoencoder, on the device that encodes.
        folder: folder of the files. Created if it is missing; runs can share it.
        image_hashes: SHA-256 of every image file.
    """

    def __init__(
        self,
        pairs: ImageFolder,
        space: LatentSpace,
        folder: Path,
        image_hashes: Sequence[str],
    ) -> None:
        if pairs.config.crop != "center":
            raise ValueError("the latent cache needs crop center, because random crops are new at each step")
        self.pairs = pairs
        self.space = space
        self.folder = folder
        self.paths = [folder / f"{latent_key(space, pairs.config, one)}.safetensors" for one in image_hashes]
        side = pairs.config.image_size // space.factor
        self.shape = (SYMMETRIES, 2, space.channels, side, side)  # mean and standard deviation of every view
        self.num_bytes = 4 * int(np.prod(self.shape)) * len(pairs)
        self._moments: Tensor | None = None
        self._fits = self.num_bytes <= MEMORY_GB * 2**30

    @property
    def in_memory(self) -> bool:
        return self._moments is not None and self.pairs.in_memory

    def prepare(self, machine: Machine) -> None:
        """Encode missing or damaged latents, distributed over the processes. Load all latents if they fit in memory.

        Raises:
            InputError: the disk is full, or the folder is not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_disk(machine)
            made = self._encode_share(machine.rank, machine.world_size, machine)
            machine.barrier("encode images")
            # If machines share no disk, nobody has looked here at the files of the other machines.
            local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._encode_share(*local, machine, done=range(machine.rank, len(self), machine.world_size))
            machine.barrier("encode images")
        except OSError as error:
            raise InputError(
                f"`latent_cache` {self.folder}: {one_line(error)} Give another folder, or none."
            ) from error
        where = "in memory" if self._fits else "read from their files"
        logger.info(
            "latents of %d images, eight views each: %.2f GB in %s (%d encoded now by this process), %s",
            len(self), self.num_bytes / 1e9, self.folder, made, where,
        )  # fmt: skip
        if self._fits:
            self._moments = torch.empty(len(self), *self.shape)
            for index in range(len(self)):
                self._moments[index] = self._read(index)

    def _check_disk(self, machine: Machine) -> None:
        missing = sum(not path.is_file() for path in self.paths) * self.num_bytes / len(self)
        machine.barrier("look at the disk")  # no process may write before all have checked
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise InputError(
                f"`latent_cache` {self.folder}: the latents need {missing / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
                "are free. Give a folder on another disk, or none to encode at each step."
            )

    def _encode_share(self, rank: int, ranks: int, machine: Machine, done: Sequence[int] = ()) -> int:
        """Encode those of every ``ranks``-th image whose file is missing or damaged. Leaves out those in ``done``.

        Returns:
            The number of encoded images.
        """
        made = 0
        share = [index for index in range(rank, len(self), ranks) if index not in done]
        hide = None if machine.is_main and share else True  # None: shown on a terminal
        for index in tqdm(share, desc="encoding images", unit="image", disable=hide):
            machine.progress()
            path = self.paths[index]
            if path.is_file() and not self._is_damaged(index):
                continue
            moments = self.encode(index)
            content = safetensors.torch.save({"moments": moments}, {"crc32": checksum(moments)})
            write_bytes(path, content)
            made += 1
        return made

    def encode(self, index: int) -> Tensor:
        """(8, 2, C, h, w) float32: mean and standard deviation for all eight symmetries of an image.

        One image makes one batch, so that the result does not depend on other images. Uses float32, because the cost
        occurs only once.
        """
        image = self.pairs.example(index)["image"].numpy()  # (3, S, S)
        views = torch.from_numpy(np.stack([turn(image, (1, 2), symmetry) for symmetry in range(SYMMETRIES)]))
        device = next(self.space.parameters()).device
        mean, std = self.space.moments(views.to(device))  # (8, C, h, w) each
        return torch.stack([mean, std], dim=1).float().cpu().clone()

    def _is_damaged(self, index: int) -> bool:
        path = self.paths[index]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                moments, expected = file.get_tensor("moments"), (file.metadata() or {}).get("crc32")
            if tuple(moments.shape) == self.shape and checksum(moments) == expected:
                return False
        except safetensors.SafetensorError:
            pass
        logger.warning("%s is damaged: encoding its image again", path)
        return True

    def _read(self, index: int, symmetry: int | None = None) -> Tensor:
        """Moments of an image for all symmetries (8, 2, C, h, w), or for one. Reads only this part of the file."""
        try:
            with safetensors.safe_open(self.paths[index], framework="pt") as file:
                moments = file.get_slice("moments")
                return moments[:] if symmetry is None else moments[symmetry]
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{self.paths[index]}: {error}. Run the same command to encode it again.") from error

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example, with the same symmetry and mask as ``pairs[key]``.

        Returns:
            "moments": (2, C, h, w) float32, mean and standard deviation. "mask": as in ``PairedFolder``.
        """
        index, draw = key
        symmetry = self.pairs.symmetry(draw)
        moments = self._read(index, symmetry) if self._moments is None else self._moments[index, symmetry]
        return {"moments": moments, "mask": self.pairs.mask(index, symmetry)}

    def look_draw(self, index: int, draw: int) -> np.ndarray:
        """Look numbers (N,) of a random window, measured in the image."""
        return self.pairs.look_draw(index, draw)


def latent_key(space: LatentSpace, config: DataConfig, image_hash: str) -> str:
    """32 hex digits that depend on the autoencoder, the image file, and the settings that turn it into a tensor."""
    view = {name: value for name, value in config.to_dict().items() if name not in NOT_ABOUT_IMAGES}
    parts = {"reader": READER, "autoencoder": space.fingerprint, "image": image_hash, "view": view}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checksum(moments: Tensor) -> str:
    return f"{zlib.crc32(moments.numpy().tobytes()):08x}"
