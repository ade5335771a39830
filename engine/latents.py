"""Latents of a training set, encoded once: mean and standard deviation for all eight flips and quarter turns.

Encoding at each step costs more than training a small model (84 % of the arithmetic of SiT-S/2 at 256 px). What is kept
is the posterior of every view that training can see, so that the flip and the draw from the posterior stay new at each
step, as they are when encoding online.

One file per image, ``FOLDER/KEY.safetensors``. The key is made of the autoencoder, the image's bytes and all that turns
them into tensors: a changed image, autoencoder or window is encoded anew, runs share what they have in common, and an
interrupted encoding goes on where it was.
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

from common.disk import write_atomically
from common.errors import InputError
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.unlabelled import UnlabelledFolder
from dataset.views import SYMMETRIES, turn
from engine.autoencoder import LatentSpace
from engine.machine import Machine

logger = logging.getLogger(__name__)
READER = 1  # raise it when files are read, resized or windowed in another way: older latents are then made anew
NOT_ABOUT_IMAGES = ("num_classes", "mask_values")


class LatentPairs(torch.utils.data.Dataset):
    """The pairs of a ``PairedFolder`` with centred crops, images replaced by the moments of their latents.

    Args:
        pairs: the data set; its draws choose the same flips and turns here.
        space: the autoencoder, on the device that encodes.
        folder: where the files lie; made where it does not exist, and shared by runs.
        image_hashes: SHA-256 of every image file.
        memory_gb: most memory for latents; above it they are read from their files at each access.
    """

    def __init__(
        self,
        pairs: PairedFolder | UnlabelledFolder,
        space: LatentSpace,
        folder: Path,
        image_hashes: Sequence[str],
        memory_gb: float = 4.0,
    ) -> None:
        if pairs.config.crop != "center":
            raise ValueError("latents are kept for crop center only, where an image has one view")
        self.pairs = pairs
        self.space = space
        self.folder = folder
        self.paths = [folder / f"{latent_key(space, pairs.config, one)}.safetensors" for one in image_hashes]
        side = pairs.config.image_size // space.factor
        self.shape = (SYMMETRIES, 2, space.channels, side, side)  # mean and standard deviation of every view
        self.num_bytes = 4 * int(np.prod(self.shape)) * len(pairs)
        self._moments: Tensor | None = None
        self._fits = self.num_bytes <= memory_gb * 2**30

    @property
    def in_memory(self) -> bool:
        return self._moments is not None and self.pairs.in_memory

    def prepare(self, machine: Machine) -> None:
        """Encode what is missing or damaged, shared out over the processes, and read all of it where it fits memory.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_disk(machine)
            made = self._encode_share(machine.rank, machine.world_size, machine)
            machine.barrier("encode images")
            # Machines without a common disk: what the others made is made here, too.
            local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._encode_share(*local, machine, check=False)
            machine.barrier("encode images")
        except OSError as error:
            raise InputError(
                f"latent_cache {self.folder}: {error}. Give another folder, or none.", "latent_cache"
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
        machine.barrier("look at the disk")  # no process writes before all have looked
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise InputError(
                f"latent_cache {self.folder}: {missing / 1e9:.1f} GB of latents are to be written and "
                f"{free / 1e9:.1f} GB are free. Give a folder on another disk, or none to encode anew at each step.",
                "latent_cache",
            )

    def _encode_share(self, rank: int, ranks: int, machine: Machine, check: bool = True) -> int:
        """Make what is missing of every ``ranks``-th image; ``check`` reads the others. Returns how many were made."""
        made = 0
        share = range(rank, len(self), ranks)
        for index in tqdm(share, desc="encoding images", unit="image", disable=None if machine.is_main else True):
            machine.progress()
            path = self.paths[index]
            if path.is_file() and not (check and self._is_damaged(index)):
                continue
            moments = self.encode(index)
            content = safetensors.torch.save({"moments": moments}, {"crc32": checksum(moments)})
            write_atomically(path, lambda file, content=content: file.write(content))
            made += 1
        return made

    def encode(self, index: int) -> Tensor:
        """(8, 2, C, h, w) float32: mean and standard deviation of every view. The views of one image are one batch, so
        that the result depends on nothing else; in float32, since it is done once."""
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
        logger.warning("%s is damaged: its image is encoded anew", path)
        return True

    def _read(self, index: int, symmetry: int | None = None) -> Tensor:
        """All views (8, 2, C, h, w) of an image, or one of them; from the file only what is asked for is read."""
        try:
            with safetensors.safe_open(self.paths[index], framework="pt") as file:
                moments = file.get_slice("moments")
                return moments[:] if symmetry is None else moments[symmetry]
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{self.paths[index]}: {error}. The same command makes it anew and goes on.") from error

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example: the view and mask that ``pairs[key]`` has.

        Returns:
            "moments": (2, C, h, w) float32, mean and standard deviation; "mask": as in ``PairedFolder``.
        """
        index, draw = key
        symmetry = self.pairs.symmetry(draw)
        moments = self._read(index, symmetry) if self._moments is None else self._moments[index, symmetry]
        return {"moments": moments, "mask": self.pairs.mask(index, symmetry)}

    def look_draw(self, index: int, draw: int) -> np.ndarray:
        """As of the pairs, whose image is read."""
        return self.pairs.look_draw(index, draw)


def latent_key(space: LatentSpace, config: DataConfig, image_hash: str) -> str:
    """32 hex digits that change with the autoencoder, the image file, and how it becomes a tensor."""
    view = {name: value for name, value in config.to_dict().items() if name not in NOT_ABOUT_IMAGES}
    parts = {"reader": READER, "autoencoder": space.fingerprint, "image": image_hash, "view": view}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checksum(moments: Tensor) -> str:
    return f"{zlib.crc32(moments.numpy().tobytes()):08x}"
