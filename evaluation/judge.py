"""The judge of mask fidelity: a small U-Net that learned from real pairs what a cell looks like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from tqdm import tqdm

from common.disk import file_sha256, write_atomically
from common.locks import one_maker
from common.log import Pace
from common.pictures import from_uint8
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.masks import to_prob_map

logger = logging.getLogger(__name__)
JUDGE_VERSION = 2  # raise it if the same data and settings would give another judge
CHANNELS = (16, 32, 64, 128)
WINDOW_BATCH = 16  # windows of a large image judged at once
LOG_EVERY = 100
STRIDE = 8  # three halvings: sides are padded to a multiple


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge is trained. ``steps`` is the same for any number of pairs. Gray images count as 3 channels."""

    num_classes: int
    channels: int = 3
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0


class Judge:
    """A trained segmenter.

    Args:
        network: (B, C, H, W) in [-1, 1] -> (B, K, H, W) logits, H and W multiples of ``STRIDE``.
        side: side of its training squares in pixels. Larger images are segmented in overlapping windows of this side.
    """

    def __init__(self, network: nn.Module, device: torch.device, side: int) -> None:
        self.network = network.to(device).eval()
        self.device = device
        self.side = side

    @torch.inference_mode()
    def class_maps(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Most probable class of every pixel.

        Args:
            images: B arrays uint8 (H, W, C) of one size.

        Returns:
            (B, H, W) uint8.
        """
        batch, network = self._batch(images), partial(predict, self.network)
        if max(batch.shape[2:]) > self.side:
            logits = sliding_window_inference(
                batch, (self.side, self.side), WINDOW_BATCH, network, mode="gaussian", padding_mode="replicate"
            )
        else:
            logits = network(batch)
        return logits.argmax(dim=1).to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features of whole images: the output of the deepest layer, averaged over the image.

        Args:
            images: B arrays uint8 (S, S, C).

        Returns:
            (B, CHANNELS[-1]) float64.
        """
        found: list[Tensor] = []
        hook = deepest_layer(self.network).register_forward_hook(lambda layer, given, out: found.append(out))
        try:
            predict(self.network, self._batch(images))
        finally:
            hook.remove()
        return found[0].mean(dim=(2, 3)).double().cpu().numpy()

    def _batch(self, images: Sequence[np.ndarray]) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1] on the device."""
        return torch.stack([from_uint8(image) for image in images]).to(self.device)


def deepest_layer(network: nn.Module) -> nn.Module:
    """The layer of lowest resolution of MONAI's U-Net: down, [down, [... deepest ...], up], up."""
    layer = network.get_submodule("model")
    while isinstance(layer, nn.Sequential):
        inner = [part for part in layer if hasattr(part, "submodule")]
        if not inner:
            break
        layer = inner[0].get_submodule("submodule")
    return layer


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K, H, W) of images (B, C, H, W) of any size. Pads at the right and bottom, and crops the result."""
    height, width = images.shape[-2:]
    padding = (0, -width % STRIDE, 0, -height % STRIDE)
    return network(F.pad(images, padding, mode="replicate"))[..., :height, :width]


def judged_channels(config: DataConfig) -> int:
    """Channels that a segmenter sees: the model's own, with gray repeated to three."""
    return 3 if config.channels == 1 else config.channels


def build_network(num_classes: int, seed: int = 0, channels: int = 3) -> nn.Module:
    """MONAI's U-Net (Ronneberger et al. 2015, arXiv 1505.04597). Leaves the global random generator unchanged.

    Norms are over the batch. MONAI's default, over the instance, amplifies the noise of a window without cells, and
    some seeds then find cells there.
    """
    strides = (2,) * (len(CHANNELS) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(
            spatial_dims=2, in_channels=channels, out_channels=num_classes, channels=CHANNELS, strides=strides,
            num_res_units=1, norm="batch",
        )  # fmt: skip


def train_judge(pairs: PairedFolder, config: JudgeConfig, device: torch.device, progress: bool = False) -> nn.Module:
    """Train the U-Net. The same data and config give the same network on the same machine.

    Args:
        pairs: real images and masks, read as for the generator.

    Returns:
        The network, on ``device``.
    """
    network = build_network(config.num_classes, config.seed, config.channels).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    loss_of = DiceCELoss(softmax=True, batch=True)
    order = np.random.default_rng(config.seed)
    queue: list[int] = []
    pace = Pace(config.steps, "steps")
    bar = tqdm(range(config.steps), desc="training the judge", disable=None if progress else True)
    for step in bar:
        while len(queue) < config.batch_size:
            queue += order.permutation(len(pairs)).tolist()
        indices, queue = queue[: config.batch_size], queue[config.batch_size :]
        examples = [pairs[index, step * config.batch_size + place] for place, index in enumerate(indices)]
        images = torch.stack([example["image"] for example in examples]).to(device)  # (B, C, S, S)
        masks = torch.stack([example["mask"] for example in examples]).to(device)
        loss = loss_of(
            predict(network, images.expand(-1, config.channels, -1, -1)), to_prob_map(masks, config.num_classes)
        )  # soft masks stay soft
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
            logger.info("segmenter: step %d of %d, loss %.4f, %s", step + 1, config.steps, loss.item(), pace(step + 1))
    return network


@dataclass(frozen=True)
class JudgeRequest:
    """A judge that a command asks for: its real pairs, its training, and the folder that keeps it.

    Attributes:
        images: folder of real images.
        masks: folder of their masks.
        cache: folder that keeps trained judges.
        device: where to train.
        mask_type: one of ``MASK_TYPES``.
        steps: training steps.
        seed: of the training, its crops and the choice of held-out pairs.
        progress: show progress bars.
    """

    images: str | Path
    masks: str | Path
    cache: str | Path
    device: torch.device
    mask_type: str = "auto"
    steps: int = 400
    seed: int = 0
    progress: bool = False


class FolderJudge(NamedTuple):
    """A judge and the pairs that it learned from.

    Attributes:
        key: hash of data and settings, see :func:`judge_key`.
        cached: it was trained by an earlier command.
        pairs: its training pairs.
    """

    judge: Judge
    key: str
    cached: bool
    pairs: PairedFolder


def judge_of_folders(
    request: JudgeRequest, config: DataConfig, normalize_masks: bool, learned: str, names: Sequence[str] | None = None
) -> FolderJudge:
    """Load the judge from the cache, or train it.

    Args:
        normalize_masks: divide soft masks by their sum.
        learned: type of the masks of the model or set that is judged, as of ``decide_mask_rule``.
        names: pairs to use; None uses all.

    Raises:
        InputError: files are unusable.
    """
    pairs = PairedFolder(
        request.images, request.masks, config, request.mask_type, seed=request.seed, progress=request.progress,
        names=names, normalize=normalize_masks, learned=learned,
    )  # fmt: skip
    judge_config = JudgeConfig(config.num_classes, judged_channels(config), request.steps, seed=request.seed)
    return FolderJudge(
        *load_or_train_judge(pairs, judge_config, request.cache, request.device, request.progress), pairs
    )


def load_or_train_judge(
    pairs: PairedFolder, config: JudgeConfig, cache_dir: str | Path, device: torch.device, progress: bool = False
) -> tuple[Judge, str, bool]:
    """Load the judge of these pairs and settings from the cache, or train it.

    Returns:
        The judge, its key (a hash of data and settings) and whether it came from the cache.
    """

    def train() -> nn.Module:
        logger.info("training the judge, a small segmenter, on these %d pairs: %d steps", len(pairs), config.steps)
        return train_judge(pairs, config, device, progress)

    key = judge_key(pairs, config)
    network = build_network(config.num_classes, channels=config.channels)
    path = Path(cache_dir) / f"judge-{key[:24]}.pt"
    with contextlib.nullcontext() if path.is_file() else one_maker(path, "trains"):
        network, cached = load_or_train(path, network, train)
    return Judge(network, device, pairs.config.image_size), key, cached


def load_or_train(path: Path, network: nn.Module, train: Callable[[], nn.Module]) -> tuple[nn.Module, bool]:
    """A trained network from its file. If there is none, or a damaged one, train it and write it to the file.

    ``network`` takes the weights of the file. ``train`` returns a trained network of the same shape.

    Returns:
        The network, and whether it came from the file.
    """
    if path.is_file():
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return network, True
        except Exception as error:  # a damaged file can raise anything
            logger.warning("%s is damaged (%s): training it again", path, type(error).__name__)
    network = train()
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(weights, file))
    return network, False


def judge_key(pairs: PairedFolder, config: JudgeConfig) -> str:
    """SHA-256 of the files, how they are read, and the training settings: all that decides the judge."""
    settings = {
        "version": JUDGE_VERSION,
        "judge": asdict(config),
        "data": pairs.config.to_dict(),
        "mask_type": pairs.rule.mask_type,
        "mask_maximum": pairs.rule.maximum,
        "files": [[pair.name, file_sha256(pair.image_path), file_sha256(pair.mask_path)] for pair in pairs.pairs],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
