"""The practice loop for one selection of labels: a generator, new masks, rounds of synthetic images, a recommendation.

1. A segmenter learns the labelled images. It gives the unlabelled images soft pseudo-masks. New masks follow what it
   counts there. It tells which synthetic pixels were drawn wrongly.
2. The generator learns the labelled images, and the unlabelled ones with their pseudo-masks. If it is trained again, a
   segmenter learns its images first, and gives the next training new pseudo-masks.
3. Round 0 draws every mask once. Each next round draws the masks again that the segmenters of the round found hard.
4. Rounds go on while the cross-validated score rises: round 0 must beat real images alone, each next round the one
   before. What is not clearly ahead of real images alone is not recommended.

Every stage keeps its files. The same call continues.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.cells import connected_cells, touches_border
from common.disk import (
    SETTINGS,
    link_or_copy,
    open_work,
    write_atomically,
    write_bytes,
    write_json,
)
from common.errors import InputError
from common.log import with_progress
from common.plain import read_as
from dataset.config import DataConfig
from dataset.files import encode_image, find_files, find_images, find_images_and_masks, read_image
from engine.checkpoint import read_checkpoint
from evaluation.experiments.cross_validation import LABELLED, Fold, FoldResult, Made, make_folds, run_fold
from evaluation.experiments.labelled import LabelledFolders, Named, plain_images, real_pairs, set_pairs
from evaluation.experiments.practice_folder import ignored
from evaluation.experiments.practice_masks import (
    CellFiles,
    LayoutStatistics,
    layout_statistics,
    link_labelled,
    merge_masks,
    note_pseudo_masks,
    on_whole_image,
    plan_parts,
    soft_mask,
    write_pseudo_masks,
)
from evaluation.experiments.practice_rules import (
    Scored,
    class_mean_losses,
    plan_draws,
    wrong_pixels,
)
from evaluation.experiments.practice_settings import (
    CLASS_PSEUDO_SHARE,
    SIMULATED_SHARE,
    PracticeSettings,
    Tools,
    Unlabelled,
)
from evaluation.experiments.segmenter import Found, Phase, Segmenter, SegmenterConfig, train_segmenter
from evaluation.experiments.sources import Labelled
from evaluation.experiments.stamps import hashes_of_labels, refuse_other_files
from evaluation.instances import mean_of_known
from evaluation.judge import build_network, judged_channels, load_or_train
from evaluation.output import number as show_number
from synthetic.reader import SampleSet, read_whole

logger = logging.getLogger(__name__)
PRACTICE_VERSION = 7  # raise it when the same settings would give another result
REAL, PLAIN = "real", "round 0, nothing ignored"


class Practice:
    """One run of the loop.

    Args:
        folders: the labelled images.
        unlabelled: folder of images without labels, or None.
        settings: budget and rules.
    """

    def __init__(
        self, folders: LabelledFolders, unlabelled: Path | None, settings: PracticeSettings, tools: Tools, folder: Path,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.folders, self.unlabelled, self.settings = folders, unlabelled, settings
        self.tools, self.folder, self.device = tools, folder, device
        self.seen: list[str] = []  # sha256 of the labelled images
        self.checkpoint = Path()

    def run(self) -> dict:
        """Run all stages. Returns the content of ``practice.json``.

        Raises:
            InputError: too few labelled images, or a folder of other work.
        """
        images, _ = find_images_and_masks(self.folders.images, self.folders.masks)
        if len(images) < 2:
            raise InputError(f"{self.folders.images} holds {len(images)} image: cross-validation needs two or more")
        if self.settings.generators > 1 and self._to_segment is None:
            raise InputError("`generators` above 1 need unlabelled images with pseudo-masks")
        self.folders.check_instances()
        made_with = {"practice": PRACTICE_VERSION, **asdict(self.settings), "mask_type": self.folders.mask_type}
        made_with |= hashes_of_labels(self.folders, self.unlabelled) | self.tools.settings
        with open_work(self.folder, made_with, upgrade=partial(refuse_other_files, self.folder, made_with)):
            self.seen = made_with["images_sha256"]
            self._train_generators()
            return self._rounds()

    @property
    def _to_segment(self) -> Path | None:
        """Folder of the unlabelled images that get pseudo-masks."""
        return self.unlabelled if self.settings.pseudo_masks else None

    def _train_generators(self) -> None:
        """Train the generator. With pseudo-masks, train for one step first: the checkpoint says how images are read."""
        images = self._to_segment
        if images is None:
            _announce("train the generator")
            self.checkpoint = self.tools.train(self.folders, Unlabelled(self.unlabelled), self.folder / "generator")
            return
        _announce("read all images, in a training of a single step")
        self.checkpoint = self.tools.train(self.folders, Unlabelled(images), self.folder / "reading", steps=1)
        for number in range(self.settings.generators):
            _announce("give the unlabelled images pseudo-masks, by a segmenter of the labelled images")
            masks = self._soft_masks(images, number)
            _announce("train the generator")
            run = self.folder / _numbered("generator", number)
            self.checkpoint = self.tools.train(self.folders, Unlabelled(images, masks), run)

    # --- what is read once --------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> DataConfig:
        """How the generator reads images."""
        return DataConfig.from_dict(read_checkpoint(self.checkpoint)["config"]["data"])

    @property
    def cells_only(self) -> bool:
        """Whether the classes are cell and background. If not, new layouts keep the classes of their cells."""
        return self.folders.instances is not None or self.config.num_classes == 2

    @property
    def num_classes(self) -> int:
        """K of the segmenters. They do not learn a boundary class that is computed from instances."""
        return 2 if self.cells_only else self.config.num_classes

    @cached_property
    def segmenter_config(self) -> SegmenterConfig:
        """How segmenters are trained."""
        settings = self.settings
        return SegmenterConfig(
            self.num_classes, judged_channels(self.config), settings.crop, settings.steps, seed=settings.seed
        )

    @cached_property
    def real(self) -> list[Named]:
        """The labelled images."""
        return real_pairs(self.folders, self.config, self.num_classes)

    @cached_property
    def folds(self) -> list[Fold]:
        """Folds of the labelled images."""
        return make_folds(self.real, self.settings.folds, self.settings.seed)

    # --- segmenters ---------------------------------------------------------------------------------------------------

    @cached_property
    def committee(self) -> list[nn.Module]:
        """The segmenter of each fold, trained on real images alone."""
        return [self._of_real(fold) for fold in self.folds]

    def _of_real(self, fold: Fold) -> nn.Module:
        def train() -> nn.Module:
            network, result = run_fold(fold, len(self.folds), [], self.segmenter_config, self.device)
            self._keep(REAL, fold, result)
            return network

        return self._kept_network(f"real_{fold.number}", train)

    @cached_property
    def teacher(self) -> nn.Module:
        """A segmenter of all labelled images. It is better than those of the folds, which have seen fewer."""
        phase = Phase(1, [(Labelled([one.item for one in self.real]), 1)])
        return self._kept_network("all_real", lambda: train_segmenter([phase], self.segmenter_config, self.device))

    def _student(self, number: int) -> nn.Module:
        """A segmenter of all labelled images and of images by the generator before training ``number``."""

        def train() -> nn.Module:
            draws = dict.fromkeys(self.make_masks()[0], 1)
            made = self._draw(f"images_of_generator_{number - 1}", draws, dict.fromkeys(draws, 0), self.settings.seed)
            sources = [(Labelled([one.item for one in group]), 0.5) for group in (self.real, made)]
            return train_segmenter([Phase(1, sources)], self.segmenter_config, self.device)

        return self._kept_network(f"all_real_and_synthetic_{number}", train)

    def _kept_network(self, name: str, train: Callable[[], nn.Module]) -> nn.Module:
        """A segmenter from its file, or trained and written to it."""
        network = build_network(self.num_classes + 1, channels=self.segmenter_config.channels)
        return load_or_train(self.folder / "segmenters" / f"{name}.pt", network, train)[0]

    @cached_property
    def mean_losses(self) -> list[float]:
        """Mean loss of every class on held-out real images."""
        scored = []
        for fold, network in zip(self.folds, self.committee, strict=True):
            segmenter = Segmenter([network], self.device)
            for one in fold.held_out:
                scored.append(Scored(segmenter.pixel_losses(one.item.image, one.item.classes), one.item.classes))
        return class_mean_losses(scored, self.num_classes)

    def cross_validate(self, variant: str, made: Sequence[Made]) -> list[FoldResult]:
        """Results of all folds. Folds that have a file are not run again."""
        results = []
        for fold in self.folds:
            path = self._result_path(variant, fold)
            if not path.is_file():
                _, result = run_fold(fold, len(self.folds), made, self.segmenter_config, self.device)
                self._keep(variant, fold, result)
                shown = show_number(result.score.ap50)
                logger.info("%s, fold %d of %d: AP %s", variant, fold.number + 1, len(self.folds), shown)
            results.append(read_as(path, FoldResult.from_dict, "remove it to score again"))
        return results

    def _result_path(self, variant: str, fold: Fold) -> Path:
        return self.folder / "scores" / f"{variant.replace(' ', '_').replace(',', '')}_{fold.number}.json"

    def _keep(self, variant: str, fold: Fold, result: FoldResult) -> None:
        path = self._result_path(variant, fold)
        path.parent.mkdir(exist_ok=True)
        write_json(path, asdict(result))

    # --- masks --------------------------------------------------------------------------------------------------------

    def make_masks(self) -> tuple[dict[str, str], LayoutStatistics | None]:
        """Make the new masks, in ``masks/instances``. Returns name -> kind, and the statistics that layouts follow."""
        place = self.folder / "masks"
        note = place / "masks.json"
        if note.is_file():
            return read_as(note, _made_masks, f"remove {place} to make the masks again")
        found = self._segmented()
        statistics = self._statistics([self._cells_in(one) for _, one in found])
        place.mkdir(exist_ok=True)
        copied, count = self._copied_masks(found, self.pseudo_share if statistics else 1.0, place)
        kinds = merge_masks([*copied, *self._new_layouts(statistics, self.settings.masks - count, place)], place)
        write_json(note, {"kinds": kinds, "statistics": None if statistics is None else asdict(statistics)})
        return kinds, statistics

    @property
    def pseudo_share(self) -> float:
        """Fraction of the new masks that is taken from unlabelled images."""
        if self.settings.pseudo_share is None:
            return 0.0 if self.cells_only else CLASS_PSEUDO_SHARE
        return self.settings.pseudo_share

    @property
    def simulated_share(self) -> float:
        """Fraction of the new masks that is simulated. Simulated cells have no classes."""
        if self.settings.simulated_share is None or not self.cells_only:
            return SIMULATED_SHARE if self.cells_only else 0.0
        return self.settings.simulated_share

    def _cells_in(self, found: Found) -> np.ndarray:
        """Instance map of what a segmenter found. Masks of classes tell no touching cells apart, nor does this then."""
        return found.cells if self.cells_only else connected_cells(found.classes > 0)

    def _statistics(self, found: Sequence[np.ndarray]) -> LayoutStatistics | None:
        """What new layouts follow. None if there are to be none, or if they cannot be made of masks of classes."""
        if not self.cells_only and self.pseudo_share == 1:
            return None
        if not self.cells_only and not self._flat_on_zero:
            logger.warning("no new layouts are made: they need masks of class ids whose background is stored as 0")
            return None
        labelled, side = [one.item.cells for one in self.real], self.config.image_size
        statistics = layout_statistics(found, labelled, side)
        if statistics is None and len(found):
            logger.warning("too few cells are found in the unlabelled images; masks follow the labelled ones")
        statistics = statistics or layout_statistics(labelled, labelled, side)
        if statistics is None and self.cells_only:
            raise InputError("the labelled images hold too few whole cells to make new layouts of them")
        if statistics is None:
            logger.warning("the labelled images hold too few whole cells, so no new layouts are made of them")
        return statistics

    def _copied_masks(self, found: Sequence[tuple[str, Found]], share: float, place: Path) -> tuple[list[Path], int]:
        """Masks that are no new layouts: this share of pseudo-masks and, with several classes, the labelled masks.

        Returns:
            Their folders, and the number of pseudo-masks.
        """
        parts, made = [], 0
        if not self.cells_only:
            link_labelled(self.folders.images, self.folders.masks, place / LABELLED)
            parts.append(place / LABELLED)
        count = round(self.settings.masks * share)
        if count and found:
            stored, side = None if self.cells_only else self.config.mask_values, self.config.image_size
            maps = [(name, one.cells if self.cells_only else one.classes) for name, one in found]
            made = write_pseudo_masks(maps, self.seen, side, count, place / "pseudo", stored)
            parts += [place / "pseudo"] if made else []
        return parts, made

    @property
    def _cell_files(self) -> CellFiles:
        """The files to cut cells from."""
        instances, masks = self.folders.instances, self.folders.masks
        return CellFiles(instances or masks, instances is None, None if self.cells_only else masks, self.config.crop)

    @property
    def _flat_on_zero(self) -> bool:
        """Whether the masks are maps of classes whose background is stored as 0."""
        if self.config.mask_values is not None:
            return self.config.mask_values[0] == 0
        return self.folders.read_masks(self.config.num_classes).rule.mask_type == "classes"

    @property
    def _single_cells(self) -> bool:
        """Whether the images are cut out around single cells: each labelled one shows one cell, off its border."""
        cells = [one.item.cells for one in self.real]
        return self.config.crop == "center" and all(one.max() == 1 and not len(touches_border(one)) for one in cells)

    def _new_layouts(self, statistics: LayoutStatistics | None, count: int, place: Path) -> list[Path]:
        """``count`` masks of recombined and simulated cells."""
        if statistics is None:
            return []
        settings, side = self.settings, self.config.image_size
        single, parts = self._single_cells, []
        if settings.simulated_share and (single or not self.cells_only):
            logger.warning("no masks are simulated, because simulated cells have no classes and are never single")
        for number, part in enumerate(plan_parts(statistics, count, self.simulated_share, side, single)):
            output = place / f"{part.kind}_{number}"
            self.tools.make_masks(part, self._cell_files, side, settings.seed + number, output)
            parts.append(output)
        return parts

    def _soft_masks(self, images: Path, number: int) -> Path:
        """Write soft pseudo-masks of all unlabelled images, for training ``number``. Returns their folder."""
        place = self.folder / _numbered("pseudo_masks", number)
        (place / "masks").mkdir(parents=True, exist_ok=True)
        if (place / SETTINGS).is_file():
            return place / "masks"
        segmenter = Segmenter([self._student(number) if number else self.teacher], self.device)
        files = find_images(images)
        for name, path in with_progress(files.items(), "making pseudo-masks", "image"):
            target = place / "masks" / f"{name}.npz"
            if target.is_file():
                continue
            probabilities, interior = segmenter.probabilities(read_whole(path, self.config))
            soft = soft_mask(probabilities, interior, self.config.num_classes)
            whole = on_whole_image(soft, read_image(path).shape[:2], self.config)
            write_atomically(target, partial(np.savez_compressed, mask=whole))
        note_pseudo_masks(place, self.seen)
        return place / "masks"

    def _segmented(self) -> list[tuple[str, Found]]:
        """Unlabelled images, by name, as the segmenter of all labels sees them."""
        if self.unlabelled is None:
            return []
        segmenter = Segmenter([self.teacher], self.device)
        images = plain_images(self.unlabelled, self.config, self.settings.unlabelled_images, self.settings.seed)
        return [(name, segmenter(image)) for name, image in images]

    # --- rounds -------------------------------------------------------------------------------------------------------

    def _rounds(self) -> dict:
        content: dict = {"version": PRACTICE_VERSION, "settings": asdict(self.settings)}
        _announce("train a segmenter on real images alone for each fold, to compare with")
        means = [value if math.isfinite(value) else None for value in self.mean_losses]
        content |= {"checkpoint": str(self.checkpoint), "mean_losses": means, "rounds": []}
        _announce("make new masks")
        kinds, statistics = self.make_masks()
        content["statistics"] = None if statistics is None else asdict(statistics)
        content["masks"] = kinds
        results = {REAL: self.cross_validate(REAL, [])}
        draws, drawn = dict.fromkeys(kinds, 1), dict.fromkeys(kinds, 0)
        hardness: dict[str, float] = {}
        made: list[Made] = []
        stopped = "no further rounds were asked for"
        for number in range(self.settings.most_rounds + 1):
            _announce(f"round {number}, the last is {self.settings.most_rounds} at most: make synthetic images")
            new = self._draw(f"round_{number}", draws, drawn, self.settings.seed + number)
            made += new
            content["rounds"].append({"round": number, "images": len(new), "draws": draws, "hardness": hardness})
            _announce(f"round {number}: train segmenters on real and synthetic images, and score them")
            if number == 0:
                results[PLAIN] = self.cross_validate(PLAIN, self.made("round_0", with_ignored=False))
            results[f"round {number}"] = self.cross_validate(f"round {number}", made)
            before = f"round {number - 1}" if number else REAL
            if _mean_ap(results[f"round {number}"]) <= _mean_ap(results[before]):
                stopped = f"round {number} is not better than {before if number else 'real images alone'}"
                break
            for mask, count in draws.items():
                drawn[mask] += count
            hardness, draws = next_draws(results[f"round {number}"], drawn, self.settings.most_draws)
            if not draws:
                stopped = "all masks were drawn as often as planned"
                break
        content["stopped"] = f"Rounds ended: {stopped}."
        content["results"] = {name: [asdict(one) for one in found] for name, found in results.items()}
        return content

    def _draw(self, folder: str, draws: Mapping[str, int], drawn: Mapping[str, int], seed: int) -> list[Made]:
        """Sample images into a folder, and mark the pixels that were drawn wrongly."""
        place = self.folder / folder
        masks = place / "masks"
        masks.mkdir(parents=True, exist_ok=True)
        sources = find_files(self.folder / "masks" / "instances", "mask")
        for mask, count in draws.items():
            for copy in range(count):
                link_or_copy(sources[mask], masks / f"{mask}__{drawn[mask] + copy:02d}{sources[mask].suffix}")
        link_or_copy(self.folder / "masks" / SETTINGS, place / SETTINGS)
        mask_type = "instances" if self.cells_only else "classes"
        self.tools.sample(self.checkpoint, masks, mask_type, seed, place / "samples")
        self._mark_wrong(folder)
        return self.made(folder, with_ignored=True)

    def _mark_wrong(self, folder: str) -> None:
        """Write the pixels to ignore, by the segmenter of all labels: those of folds miss a look that has one label."""
        place = self.folder / folder
        (place / "ignore").mkdir(exist_ok=True)
        segmenter = Segmenter([self.teacher], self.device)
        for one in self.made(folder, with_ignored=False):
            path = place / "ignore" / f"{one.name}.png"
            if path.is_file():
                continue
            losses = segmenter.pixel_losses(one.item.image, one.item.classes)
            wrong = wrong_pixels(Scored(losses, one.item.classes), self.mean_losses, self.settings.ignore_factor)
            content = encode_image(np.where(wrong, 255, 0).astype(np.uint8)[..., None])
            write_bytes(path, content)

    def made(self, folder: str, with_ignored: bool) -> list[Made]:
        """The synthetic images of a round; pixels that were drawn wrongly are of class ``IGNORE`` if asked for."""
        place = self.folder / folder
        pairs = set_pairs(SampleSet(place / "samples"), self.num_classes)
        items = [ignored(pair, place) if with_ignored else pair.item for pair in pairs]
        return [Made(pair.name, pair.name.rpartition("__")[0], item) for pair, item in zip(pairs, items, strict=True)]


def _announce(stage: str) -> None:
    """Name the stage in the log, because each stage writes many lines of its own."""
    logger.info("=== practise: %s ===", stage)


def _numbered(name: str, number: int) -> str:
    """A folder of training ``number``. The first one has no number."""
    return f"{name}_{number}" if number else name


def next_draws(
    results: Sequence[FoldResult], drawn: Mapping[str, int], most: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Hardness of every mask in a round, and how many more images the next round draws of it.

    Args:
        results: of the folds of this round.
        drawn: images of each mask so far.
        most: images of the hardest mask.
    """
    hardness = {mask: value for one in results for mask, value in one.hardness.items()}
    planned = plan_draws(hardness, most) if hardness else {}
    return hardness, {mask: count - drawn[mask] for mask, count in planned.items() if count > drawn[mask]}


def _mean_ap(results: Sequence[FoldResult]) -> float:
    """Mean AP at 0.5 over the folds; 0 if no fold has cells."""
    return mean_of_known([one.score.ap50 for one in results]) or 0.0


def _made_masks(content: dict[str, Any]) -> tuple[dict[str, str], LayoutStatistics | None]:
    known = content["statistics"]
    return content["kinds"], None if known is None else LayoutStatistics(**known)
