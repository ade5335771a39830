"""The configuration of one run: frozen dataclasses, kept in the checkpoint as plain dicts.

``settings.resolve`` makes a ``RunConfig`` from a command line. In a continued run it also reads the checkpoint. The
metadata of a field say which value is used:

    flag      name of the flag that sets the field (default: the field's own name; None: it follows from other fields)
    resume    FIXED: the checkpoint's value stays, and another one is refused
              FREE: a flag that is given replaces the checkpoint's value
              LOCAL: never taken from a checkpoint: it says where this start reads and writes, or how it uses the
              machine. Places of further files are FREE: the checkpoint remembers them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.errors import InputError
from common.plain import check_fields
from dataset.config import DataConfig
from dataset.looks import NO_LOOK, REFERENCE
from engine.autoencoder import SpaceShape
from models import MOST_TOKENS, model_width, patch_size
from transport import create_transport

FIXED, FREE, LOCAL = "fixed", "free", "local"
NO_CACHE = "none"
MOST_OF_WIDTH = 0.75  # up to this ratio of numbers per patch to width, pixels use velocity prediction
Section = TypeVar("Section")


def _set_by(flag: str | None, resume: str = FIXED, **arguments: Any) -> Any:
    return field(metadata={"flag": flag, "resume": resume}, **arguments)


def _free(default: Any) -> Any:
    return field(default=default, metadata={"resume": FREE})


def _local(default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"resume": LOCAL})


@dataclass(frozen=True)
class ModelConfig:
    """Arguments of ``models.build_model``.

    Attributes:
        name: SiT-SIZE/PATCH.
        input_size: side of the model's input, in latent pixels.
        in_channels: channels of the model's input.
        num_classes: K, background included.
        class_dropout_prob: fraction of training examples that lose their mask.
        mask_pixels: side of a patch in mask pixels, for the mask detail; 0 without it.
        time_scale: factor on t before its sinusoids.
        patch_overlap: neighbouring patches of the output overlap.
        look_numbers: numbers that describe the look of an image; 0 without looks.
        look_dropout_prob: fraction of training examples that lose their look.
    """

    name: str = _set_by("model")
    input_size: int = _set_by(None)
    in_channels: int = _set_by(None)
    num_classes: int = _set_by(None)
    class_dropout_prob: float = _set_by("mask_dropout", FREE)
    mask_pixels: int = _set_by(None)
    time_scale: float = 1.0
    patch_overlap: bool = _set_by(None, default=False)
    look_numbers: int = _set_by(None, default=0)
    look_dropout_prob: float = _set_by("look_dropout", FREE, default=0.0)


@dataclass(frozen=True)
class TransportConfig:
    """Arguments of ``transport.create_transport``."""

    path_type: str = "Linear"
    prediction: str = "velocity"
    loss_weight: str | None = None
    train_eps: float | None = None
    sample_eps: float | None = None
    time_sampling: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0


@dataclass(frozen=True)
class OptimiserConfig:
    """Length and learning rate of a run, and its seed. Counts are images or steps."""

    epochs: int = _free(1400)
    max_steps: int | None = _free(None)
    global_batch_size: int = _free(256)
    accumulate: int = _free(1)
    lr: float = _free(1e-4)
    warmup_steps: int = _free(100)
    cooldown_steps: int = _free(0)
    weight_decay: float = _free(0.0)
    grad_clip: float = _free(1.0)
    ema_decay: float = _free(0.9999)
    seed: int = _free(0)


@dataclass(frozen=True)
class TrainConfig:
    """Where a run reads and writes, how often it reports, and how it uses the machine.

    Attributes:
        init_from: the weights that a new run started from.
        cfg_scale: guidance of the previews.
        latent_cache: folder of kept latents; None chooses.
        unlabelled_path: folders of images without masks.
        unlabelled_mask_path: folders of their pseudo-masks.
        unlabelled_share: fraction of each batch.
        groups: table of the groups of images.
        group_column: column of this table.
        balance_groups: choose each group equally often.
    """

    data_path: Path = _local()
    mask_path: Path = _local()
    results_dir: Path = _local(Path("results"))
    run_name: str | None = _local(None)
    init_from: str | None = None
    mask_type: str = _free("auto")
    normalize_masks: bool = _free(False)
    unlabelled_path: tuple[str, ...] = _free(())
    unlabelled_mask_path: tuple[str, ...] = _free(())
    unlabelled_share: float = _free(0.25)
    groups: str | None = _free(None)
    group_column: str = _free("group")
    balance_groups: bool = _free(False)
    vae: str = _free("ema")
    latent_cache: str | None = _free(None)
    num_workers: int | None = _free(None)
    log_every: int = _free(100)
    ckpt_every: int = _free(1000)
    keep: int = _free(3)
    export_safetensors: bool = _free(False)
    sample_every: int = _free(1000)
    cfg_scale: float = _free(4.0)
    wandb: bool = _local(False)
    device: str = _local("auto")
    precision: str = _free("auto")
    compile: bool = _local(False)
    recompute_activations: bool = _local(False)


def choose_transport(given: Mapping[str, Any], model: str, channels: int, in_pixels: bool) -> TransportConfig:
    """The transport of a new run. A field that is not given gets the value that suits the model and its space.

    Times are logit-normal for pixels. With data prediction they lie nearer to the noise, where the brightness of a
    patch is decided (benchmarks/nuclei_64px_cpu.md).

    Args:
        given: a value, or None, for every field of ``TransportConfig``.
        model: SiT-SIZE/PATCH.
        in_pixels: the model works on pixels, not on latents.

    Raises:
        InputError: the fields do not fit together, or one has no effect.
    """
    prediction = given["prediction"] or default_prediction(model, channels, in_pixels)
    follows: dict[str, Any] = {
        "prediction": prediction,
        "loss_weight": "velocity" if prediction == "data" else None,
        "time_sampling": "logit-normal" if in_pixels else "uniform",
        "time_mean": -1.2 if in_pixels and prediction == "data" else 0.0,
    }
    config = TransportConfig(**follows | {name: value for name, value in given.items() if value is not None})
    try:
        create_transport(**dataclasses.asdict(config))
    except ValueError as error:
        raise InputError(f"transport: {error}") from error
    return config


def default_prediction(model: str, channels: int, in_pixels: bool) -> str:
    """Velocity for latents, as in SiT, and for pixels if a patch has few enough numbers. Data for larger patches.

    Velocity prediction learns faster in short runs (benchmarks/nuclei_64px_cpu.md). It fails if a patch has more
    numbers than the width can carry (Li & He 2025, arXiv 2511.13720).
    """
    numbers = channels * patch_size(model) ** 2
    return "velocity" if not in_pixels or numbers <= MOST_OF_WIDTH * model_width(model) else "data"


def choose_model(
    name: str,
    image_size: int,
    shape: SpaceShape,
    *,
    num_classes: int,
    mask_dropout: float,
    mask_detail: bool,
    time_scale: float,
    patch_overlap: bool,
    look_numbers: int = 0,
    look_dropout: float = 0.0,
) -> ModelConfig:
    """The model for images of this size in a space of this shape.

    Raises:
        InputError: the image size is not a multiple of autoencoder factor x patch size, or gives too many patches.
    """
    patch = patch_size(name)
    unit = shape.factor * patch
    if image_size % unit:
        lower = image_size // unit * unit
        sizes = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise InputError(
            f"`image_size` {image_size} is not divisible by {unit} (autoencoder factor {shape.factor} x patch size "
            f"{patch} of {name}): give {sizes}."
        )
    if (image_size // unit) ** 2 > MOST_TOKENS:
        raise InputError(f"`image_size` {image_size}: gives above {MOST_TOKENS} patches; {name} reads fewer.")
    return ModelConfig(
        name=name,
        input_size=image_size // shape.factor,
        in_channels=shape.channels,
        num_classes=num_classes,
        class_dropout_prob=mask_dropout,
        mask_pixels=unit if mask_detail else 0,
        time_scale=time_scale,
        patch_overlap=patch_overlap,
        look_numbers=look_numbers,
        look_dropout_prob=look_dropout if look_numbers else 0.0,
    )


class Saved(NamedTuple):
    """A value that a checkpoint has for a flag, and whether a continued run may change it."""

    value: Any
    resume: str


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig
    transport: TransportConfig
    data: DataConfig
    optimiser: OptimiserConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain types: one dict per section."""
        return {
            name: {key: str(value) if isinstance(value, Path) else value for key, value in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`to_dict`. Older runs kept all their flags under "train".

        Raises:
            ValueError, TypeError: a section or value is missing or of the wrong type.
        """
        flags = config.get("train", {})
        return cls(
            model=_build(ModelConfig, config["model"]),
            transport=_build(TransportConfig, config["transport"]),
            data=DataConfig.from_dict(config["data"]),
            optimiser=_build(OptimiserConfig, config.get("optimiser", flags)),
            train=_build(TrainConfig, flags),
        )

    def flags(self) -> dict[str, Saved]:
        """For every flag: the value of this run, and whether a continued run may change it."""
        found = {
            "no_mask_detail": Saved(self.model.mask_pixels == 0, FIXED),
            "no_patch_overlap": Saved(not self.model.patch_overlap, FIXED),
            "look": Saved(REFERENCE if self.model.look_numbers else NO_LOOK, FIXED),
        }
        for section in (self.model, self.transport, self.data, self.optimiser, self.train):
            for one in dataclasses.fields(section):
                flag = one.metadata.get("flag", one.name)
                if flag is not None:
                    found[flag] = Saved(getattr(section, one.name), one.metadata.get("resume", FIXED))
        return found


def _build(kind: type[Section], values: dict[str, Any]) -> Section:
    """A section from a plain dict. Ignores unknown keys; missing keys get defaults. Lists of JSON become tuples."""
    check_fields(kind, values)  # type: ignore[arg-type]
    names = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = {name: value for name, value in values.items() if name in names}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
