"""Does the synthetic set help: a segmenter trained on real, synthetic, or real + synthetic images, tested on real ones.

At every share of the labels the segmenter has the same budget of steps in each arm, several seeds, and test images that
nothing was trained on. In "real + synthetic" half of the examples are real, whatever the sizes of the sets.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.disk import write_csv, write_json
from common.errors import InputError
from common.pictures import from_uint8
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.mask_folder import MaskFolder
from dataset.masks import to_prob_map
from dataset.views import SYMMETRIES, turn
from evaluation.experiments.leaks import refuse_leaks
from evaluation.experiments.split import SplitPlan
from evaluation.experiments.trial_report import NOTE, trial_notes, trial_table
from evaluation.fidelity import LabelledImage, folder_images, score_agreement
from evaluation.judge import Examples, Judge, JudgeConfig, judged_channels, train_judge
from evaluation.output import Section, Table, mean_and_spread, new_figure, number, save_figure, with_spread
from synthetic.reader import SampleSet

logger = logging.getLogger(__name__)
ARMS = ("real", "synthetic", "real + synthetic")
METRICS = {"dice": "Dice", "ap50": "AP at IoU 0.5", "pq": "panoptic quality"}


class SyntheticPairs:
    """Images and labels of a set as training examples, augmented as real pairs are.

    Images lie in the folder as training saw the real ones, so they get no window and no crop of their own; a larger
    field is several examples, squares that cover it.
    """

    def __init__(self, samples: SampleSet, seed: int = 0) -> None:
        self._images = [part for one in samples.samples for part in samples.squares(samples.synthetic(one))]
        self._masks = [part for one in samples.samples for part in samples.squares(samples.class_map(one))]
        self._seed = seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """(index, draw) -> "image": (C, S, S) float32 in [-1, 1], "mask": (S, S) uint8; the turn follows the draw."""
        index, draw = key
        symmetry = int(np.random.default_rng([self._seed, draw]).integers(SYMMETRIES))
        image, mask = (turn(one, (0, 1), symmetry) for one in (self._images[index], self._masks[index]))
        return {"image": from_uint8(image), "mask": torch.from_numpy(mask.copy())}


class MixedPairs:
    """Real pairs at even indices, synthetic ones at odd indices: each half of the examples, whatever their sizes."""

    def __init__(self, real: PairedFolder, synthetic: SyntheticPairs) -> None:
        self.sets = (real, synthetic)

    def __len__(self) -> int:
        return 2 * max(len(one) for one in self.sets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = key
        chosen = self.sets[index % 2]
        example = chosen[(index // 2) % len(chosen), draw]
        mask = example["mask"]
        if not self.sets[0].rule.is_hard and not mask.is_floating_point():  # soft real masks: one batch holds one kind
            mask = to_prob_map(mask[None], self.sets[0].config.num_classes)[0]
        return {"image": example["image"].expand(judged_channels(self.sets[0].config), -1, -1), "mask": mask}


@dataclass(frozen=True)
class UtilityRow:
    """One training: which share, arm and seed, on how many images, and its scores on the real test images."""

    share: int
    arm: str
    seed: int
    real_images: int
    synthetic_images: int
    dice: float | None
    ap50: float | None
    pq: float | None


@dataclass
class UtilityReport:
    """Result of ``score_utility``."""

    rows: list[UtilityRow]
    steps: int
    test_images: int
    provenance: dict[int, dict[str, list[str]]]

    def summary(self) -> list[dict]:
        """Mean and sample standard deviation over the seeds of every share and arm, and of the gain over real alone.

        The gain is taken seed by seed: trainings of one seed start from the same weights.
        """
        alone = {(row.share, row.seed): row.dice for row in self.rows if row.arm == "real"}
        found = []
        for share, arm in dict.fromkeys((row.share, row.arm) for row in self.rows):
            rows = [row for row in self.rows if (row.share, row.arm) == (share, arm)]
            entry = {"share": share, "arm": arm, "seeds": len(rows)}
            for metric in METRICS:
                entry[metric], entry[f"{metric}_std"] = mean_and_spread([getattr(row, metric) for row in rows])
            pairs = [(row.dice, alone.get((share, row.seed))) for row in rows]
            gains = [None if dice is None or real is None else dice - real for dice, real in pairs]
            entry["gain"], entry["gain_std"] = mean_and_spread(gains)
            found.append(entry | {"real_images": rows[0].real_images, "synthetic_images": rows[0].synthetic_images})
        return found

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        return asdict(self) | {"summary": self.summary()}


def _table(content: dict) -> Table:
    if "kind" in content:
        return trial_table(content)
    rows = []
    for one in content["summary"]:
        scores = [with_spread(one[name], one[f"{name}_std"]) for name in METRICS]
        gain = None if one["arm"] == "real" else with_spread(one["gain"], one["gain_std"], "+")
        images = f"{one['real_images']} + {one['synthetic_images']}"
        rows.append([f"{one['share']} % of the labels, {one['arm']}", *scores, gain, one["seeds"], images])
    return Table(["trained on", *METRICS.values(), "gain in Dice", "seeds", "real + synthetic images"], rows)


def _notes(content: dict) -> list[str]:
    if "kind" in content:
        return [NOTE, *trial_notes(content)]
    return [
        "Mean ± standard deviation over the seeds. Gain is the Dice over that of real images alone at the same share "
        "of the labels, seed by seed.",
        f"{content['steps']} steps each; tested on {content['test_images']} real images (windows)",
    ]


SECTION = Section(
    "utility",
    "Does it help: a segmenter trained on it, tested on real images",
    "Tested on real images that nothing was trained on.",
    _table,
    _notes,
    ("utility.png",),
)


def score_utility(
    split: SplitPlan,
    sets: Mapping[int, SampleSet],
    device: torch.device,
    checkpoints: Mapping[int, Path] | None = None,
    shares: Sequence[int] | None = None,
    mask_type: str = "auto",
    steps: int = 400,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = False,
) -> UtilityReport:
    """Train and test every arm at every share; leaks are refused before anything is trained.

    Args:
        sets: percent -> the synthetic set of that share.
        checkpoints: percent -> checkpoint of the set's generator, where its settings do not say what it has seen.
        shares: percents to run; those of ``sets`` when not given. A share without a set trains on real images only.
        mask_type: what the real masks hold.

    Raises:
        InputError: a leak, a share that the split does not have, or sets of different sizes or classes.
    """
    shares = sorted(shares or sets)
    unknown = sorted({*shares, *sets} - set(split.shares))
    if unknown:
        raise InputError(f"{split.folder} has no share of {unknown[0]} %; it has {', '.join(map(str, split.shares))}")
    config = _common_config(sets)
    any_set = next(iter(sets.values()))
    for share, samples in sets.items():
        refuse_leaks(split, share, samples, (checkpoints or {}).get(share))
    jobs = [(share, arm) for share in shares for arm in (ARMS if share in sets else ARMS[:1])]
    rows: list[UtilityRow] = []
    bar = tqdm(total=len(jobs) * len(seeds), desc="trainings", disable=None if progress else True)
    tested, started = 0, time.monotonic()
    for share in shares:
        own_set = sets.get(share)
        folder = split.part(share)
        own = config if own_set is None else own_set.require_config()
        for seed in seeds:
            real = PairedFolder(
                folder / "images", folder / "masks", own, mask_type, seed=seed, normalize=any_set.normalizes
            )
            arms: dict[str, Examples] = {"real": real}
            if own_set is not None:
                made = SyntheticPairs(own_set, seed)
                arms |= {"synthetic": made, "real + synthetic": MixedPairs(real, made)}
            test = _test_images(split, real, seed=0)
            tested = len(test)
            for arm, pairs in arms.items():
                score = _train_and_test(pairs, test, own.num_classes, real, steps, seed, device)
                counts = (
                    0 if arm == "synthetic" else len(real),
                    0 if arm == "real" or own_set is None else len(own_set),
                )
                rows.append(UtilityRow(share, arm, seed, *counts, *score))
                left = (time.monotonic() - started) / len(rows) * (len(jobs) * len(seeds) - len(rows))
                logger.info(
                    "%d %% of the labels, %s, seed %d: Dice %s; training %d of %d, about %.0f min left",
                    share, arm, seed, number(rows[-1].dice), len(rows), len(jobs) * len(seeds), left / 60,
                )  # fmt: skip
                bar.update()
    bar.close()
    rows.sort(key=lambda row: (row.share, ARMS.index(row.arm), row.seed))
    return UtilityReport(rows, steps, tested, {share: samples.provenance() for share, samples in sets.items()})


def _common_config(sets: Mapping[int, SampleSet]) -> DataConfig:
    """How all sets read their files. Gray values of a window over the data set differ with the share, and may."""
    if not sets:
        raise InputError("no synthetic set is given")
    configs = {
        share: dataclasses.replace(samples.require_config(), window_values=None) for share, samples in sets.items()
    }
    first = next(iter(configs))
    for share, config in configs.items():
        if config != configs[first]:
            raise InputError(
                f"the sets of {first} % and {share} % were made at different sizes, classes, crops or windows"
            )
    return sets[first].require_config()


def _test_images(split: SplitPlan, real: PairedFolder, seed: int) -> list[LabelledImage]:
    folder = split.part(None)
    rule = real.rule
    test = MaskFolder(folder / "masks", real.config, rule.mask_type, folder / "images", normalize=rule.normalize)
    return list(folder_images(test, test.names, seed))


def _train_and_test(
    pairs: Examples,
    test: list[LabelledImage],
    num_classes: int,
    real: PairedFolder,
    steps: int,
    seed: int,
    device: torch.device,
) -> tuple[float | None, float | None, float | None]:
    """Dice, AP at IoU 0.5 and panoptic quality of one training on the test images."""
    config = JudgeConfig(num_classes, judged_channels(real.config), steps, seed=seed)
    network = train_judge(pairs, config, device)
    judge = Judge(network, device, real.config.image_size)
    score = score_agreement(judge.class_maps, iter(test), num_classes, real.rule.has_boundary)
    return score.dice, score.ap["0.5"], score.pq


# --- files -----------------------------------------------------------------------------------------------------------


def write_utility_report(report: UtilityReport, output: Path) -> list[Path]:
    """Write ``utility.json``, ``utility.csv`` (a row per training) and ``utility.png``; what was written."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "utility.json", report.to_dict())
    columns = [field.name for field in dataclasses.fields(UtilityRow)]
    write_csv(output / "utility.csv", columns, [list(asdict(row).values()) for row in report.rows])
    draw_utility(report, output / "utility.png")
    return [output / name for name in ("utility.json", "utility.csv", "utility.png")]


def draw_utility(report: UtilityReport, path: Path) -> None:
    """Scores at every share of the labels, a colour per arm: every training, and mean with standard deviation."""
    figure = new_figure(11, 3.6)
    summary = {(entry["share"], entry["arm"]): entry for entry in report.summary()}
    shares = sorted({share for share, _ in summary})
    for axis, (metric, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for (share, arm), entry in summary.items():
            place, color = shares.index(share) + 0.22 * (ARMS.index(arm) - 1), f"C{ARMS.index(arm)}"
            known = [getattr(row, metric) for row in report.rows if (row.share, row.arm) == (share, arm)]
            known = [value for value in known if value is not None]
            axis.plot([place + 0.06] * len(known), known, "o", color=color, markersize=3, alpha=0.5)
            if known:
                spread = entry[f"{metric}_std"] or 0
                label = arm if share == max(one for one, other in summary if other == arm) else None
                axis.errorbar(place, entry[metric], spread, marker="osD"[ARMS.index(arm)], color=color, capsize=4,
                              label=label)  # fmt: skip
        axis.set_xticks(range(len(shares)), [f"{share} %" for share in shares])
        axis.set_xlim(-0.6, len(shares) - 0.4)
        axis.set_xlabel("share of the labels")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)
