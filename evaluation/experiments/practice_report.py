"""Results of the practice loop: recommendation, reason for every image, training sets, and one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.disk import link_or_copy, write_bytes, write_csv, write_json
from dataset.files import encode_image, image_suffix
from evaluation.experiments.practice import PLAIN, REAL, Practice
from evaluation.experiments.practice_folder import PRACTICE_FILE
from evaluation.experiments.segmenter import IGNORE
from evaluation.experiments.trial_report import AHEAD, HARMS, HELPS, UNCLEAR, UNKNOWN, difference
from evaluation.fidelity import LabelledImage
from evaluation.output import (
    Section,
    Table,
    cell,
    mean_and_spread,
    new_figure,
    number,
    save_figure,
    show_image,
    with_spread,
)
from synthetic.export import EXPORTS, ExportedPair

WHY, TRAINING_SETS = "why.csv", "training_sets"
ALONE, TOGETHER = "real", "real_and_synthetic"
SHOWN = 6  # hardest and easiest images in the picture
PAGE = "practice.html"


def fold_scores(results: Sequence[dict], score: str = "ap50") -> dict[int, float]:
    """Fold -> score, of the folds that have one."""
    return {one["fold"]: one["score"][score] for one in results if one["score"][score] is not None}


def recommend(results: Mapping[str, Sequence[dict]]) -> dict:
    """Which set to train with, by the cross-validated AP at IoU 0.5.

    Args:
        results: variant -> results of its folds, "real" among them.

    Returns:
        "use": whether synthetic images are recommended; "variant": the best of them; "gain" and "error": over real
        images, fold by fold; "verdict": as of ``trial_report.Difference``; "reason": in words.
    """
    real = fold_scores(results[REAL])
    means = {
        name: float(np.mean(list(fold_scores(found).values())))
        for name, found in results.items()
        if name != REAL and fold_scores(found)
    }
    if not real or not means:
        nothing = dict.fromkeys(("variant", "gain", "error"))
        return {"use": False, **nothing, "verdict": UNKNOWN, "reason": "No fold has cells to score."}
    best = max(means, key=lambda name: means[name])
    gain = difference(fold_scores(results[best]), real)
    assert gain is not None  # both have scores of the same folds
    words = {
        HELPS: "That is a clear gain.",
        UNCLEAR: f"A clear gain is above {AHEAD:g} standard errors. Few labels do not show a smaller one.",
        HARMS: "Synthetic images harm here.",
        UNKNOWN: "One fold does not tell whether that is a gain.",
    }
    reason = (
        f"Cross-validated inside the labelled images, the best synthetic set ({best}) differs from real images alone "
        f"by {with_spread(gain.mean, gain.error, '+')} in AP at IoU 0.5 (mean ± standard error over the folds). "
        f"{words[gain.verdict]}"
    )
    return {
        "use": gain.verdict == HELPS, "variant": best, "gain": gain.mean, "error": gain.error,
        "verdict": gain.verdict, "reason": reason,
    }  # fmt: skip


def chosen_images(content: dict) -> tuple[int, bool]:
    """(last round, whether pixels are ignored) of the best synthetic variant."""
    best = content["recommended"]["variant"]
    if best in (None, PLAIN):
        return 0, False
    return int(best.removeprefix("round ")), True


# --- files -----------------------------------------------------------------------------------------------------------


def write_practice(practice: Practice, content: dict) -> tuple[dict, list[Path]]:
    """Write the reasons, the training sets, the picture and ``practice.json``; its content and what was written."""
    content = content | {"recommended": recommend(content["results"])}
    folder = practice.folder
    write_why(practice, content)
    last, with_ignored = chosen_images(content)
    real = [(f"real_{one.name}", one.item) for one in practice.real]
    made = [
        (f"made_{round_}_{one.name}", one.item)
        for round_ in range(last + 1)
        for one in practice.made(f"round_{round_}", with_ignored)
    ]
    write_training_set(folder / TRAINING_SETS / ALONE, real)
    write_training_set(folder / TRAINING_SETS / TOGETHER, real, made)
    draw_practice(practice, content, folder / "practice.png")
    write_json(folder / PRACTICE_FILE, content)
    return content, [folder / PRACTICE_FILE, folder / WHY, folder / TRAINING_SETS]


def write_why(practice: Practice, content: dict) -> None:
    """``why.csv``: one row per synthetic image."""
    last, with_ignored = chosen_images(content)
    rows = []
    for one in content["rounds"]:
        ranked = sorted(one["hardness"], key=lambda mask: -one["hardness"][mask])
        for name, mask, item in practice.made(f"round_{one['round']}", with_ignored=True):
            share = float((item.classes == IGNORE).mean())
            if not ranked:
                why = "round 0 draws every mask once"
            else:
                why = f"mask {ranked.index(mask) + 1} of {len(ranked)} by loss, drawn {one['draws'][mask]} times more"
            best = one["round"] <= last
            hard = one["hardness"].get(mask)
            rows.append(
                [f"round_{one['round']}/samples/{name}", one["round"], mask, content["masks"].get(mask, ""),
                 cell(hard, 4), f"{share:.4f}", "yes" if best else "no",
                 "yes" if best and with_ignored else "no", why]
            )  # fmt: skip
    columns = ["image", "round", "mask", "mask_part", "loss", "ignored_share", "in_best_set", "ignore_applied", "why"]
    write_csv(practice.folder / WHY, columns, rows)


def write_training_set(
    folder: Path, real: Sequence[tuple[str, LabelledImage]], made: Sequence[tuple[str, LabelledImage]] = ()
) -> None:
    """Images, masks (class ids, 255 is ignored) and instances as PNG, and the layouts of Cellpose and StarDist.

    Images that are neither gray nor RGB are TIFF.

    These tools draw every pair equally often, but half of the examples shall be real. So their layouts hold each real
    pair several times (links ``copyN_NAME``), until about half of the pairs are real.
    """
    images = [*real, *made]
    for name, item in images:
        arrays = {
            "images": item.image,
            "masks": item.classes.astype(np.uint8)[..., None],
            "instances": item.cells.astype(np.uint16)[..., None],
        }
        for kind, array in arrays.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            path = _file_of(folder / kind, name, array)
            write_bytes(path, encode_image(np.ascontiguousarray(array)))
            if path.suffix != ".png":  # earlier versions named every file so
                path.with_suffix(".png").unlink(missing_ok=True)
    for layout in ("cellpose", "stardist"):
        (folder / layout).mkdir(exist_ok=True)
        EXPORTS[layout](folder / layout, _exported(folder, images))
        once = _files_of(folder / layout, [name for name, _ in real])
        for copied in range(2, 1 + round(len(made) / len(real))):
            for path in once:
                link_or_copy(path, path.with_name(f"copy{copied}_{path.name}"))


def _file_of(folder: Path, name: str, array: np.ndarray) -> Path:
    """The file of an (H, W, C) array; its suffix says its format."""
    return folder / f"{name}{image_suffix(array.shape[2], array.dtype)}"


def _files_of(layout: Path, names: Sequence[str]) -> list[Path]:
    """Files of a layout that belong to pairs of these names."""
    endings = ("_img.tif", "_masks.tif", ".tif")
    known = {f"{name}{ending}" for name in names for ending in endings}
    return [path for path in sorted(layout.rglob("*.tif")) if path.name in known]


def _exported(folder: Path, images: Sequence[tuple[str, LabelledImage]]) -> Iterator[ExportedPair]:
    for name, item in images:
        classes = np.where(item.classes == IGNORE, 0, item.classes).astype(np.uint8)
        path = _file_of(folder / "images", name, item.image)
        yield ExportedPair(name, path, item.image, True, item.cells.astype(np.uint16), classes)


def draw_practice(practice: Practice, content: dict, path: Path) -> None:
    """Images of the hardest and the easiest masks of round 0, with the outlines of the cells; ignored pixels red."""
    items = {one.mask: one.item for one in practice.made("round_0", with_ignored=True)}
    found = {mask: loss for one in content["results"]["round 0"] for mask, loss in one["hardness"].items()}
    order = sorted(found, key=lambda mask: -found[mask])
    rows = [("hardest", order[:SHOWN]), ("easiest", order[::-1][:SHOWN])]
    figure = new_figure(1.9 * SHOWN, 8.4)
    axes = figure.subplots(4, SHOWN, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for row, (title, masks) in enumerate(rows):
        for column, mask in enumerate(masks):
            item = items[mask]
            show_image(axes[2 * row, column], item.image, f"{title}, loss {found[mask]:.2f}", item.cells > 0)
            red = item.image.copy()
            red[item.classes == IGNORE] = [255] + [0] * (red.shape[-1] - 1)
            show_image(axes[2 * row + 1, column], red, "red: ignored")
    save_figure(figure, path)


# --- as people read it -----------------------------------------------------------------------------------------------


def _table(content: dict) -> Table:
    real = fold_scores(content["results"][REAL])
    counts = {f"round {one['round']}": one["images"] for one in content["rounds"]}
    rows, total = [], 0
    for name, results in content["results"].items():
        total += counts.get(name, 0)
        images = 0 if name == REAL else counts["round 0"] if name == PLAIN else total
        known = [list(fold_scores(results, score).values()) for score in ("ap50", "ap75", "dice")]
        scores = [with_spread(*mean_and_spread(values)) for values in known]
        gain = None if name == REAL else difference(fold_scores(results), real)
        shown = None if gain is None else with_spread(gain.mean, gain.error, "+")
        rows.append([name, *scores, shown, images])
    return Table(
        ["trained on real and", "AP 0.5", "AP 0.75", "Dice", "gain in AP 0.5 ± error", "synthetic images"], rows
    )


def _notes(content: dict) -> list[str]:
    advice = content["recommended"]
    use = TOGETHER if advice["use"] else ALONE
    decision = "use the synthetic images" if advice["use"] else "do not use synthetic images"
    unsure = advice["verdict"] in (UNCLEAR, UNKNOWN)
    compare = (
        f"To find out, train with {TRAINING_SETS}/{ALONE} and {TRAINING_SETS}/{TOGETHER}, and test on other images."
    )
    lines = [
        f"Recommendation: {decision}{' yet' if unsure else ''}. {advice['reason']}",
        *([compare] if unsure else []),
        *([content["stopped"]] if "stopped" in content else []),
        f"Train with {TRAINING_SETS}/{use}. {WHY} says for every image why it is there.",
    ]
    lines += content.get("commands", {}).get(use, [])
    statistics = content["statistics"]
    if statistics is not None:
        lines.append(
            f"New masks follow {statistics['images']} images: covered share {number(statistics['densities'][0], 2)} to "
            f"{number(statistics['densities'][-1], 2)}, mean diameter {number(statistics['diameter'], 3)} pixels, "
            f"{number(100 * statistics['touching'], 2)} % of the cells touch another."
        )
    means = ", ".join(f"class {k}: {number(value, 3)}" for k, value in enumerate(content["mean_losses"]))
    factor = content["settings"]["ignore_factor"]
    lines.append(f"Pixels are ignored above {factor:g} times the mean loss on real images ({means}).")
    return lines


SECTION = Section(
    "practice",
    "Practice: which synthetic images help these labels",
    "Cross-validation inside the labelled images: mean ± standard deviation over the folds. In every row the segmenter "
    "has the same number of steps. From round 0 on, pixels that were drawn wrongly are ignored; later rounds draw hard "
    "masks again. The generator has learned the held-out images, too, so gains look larger than they are.",
    _table,
    _notes,
    ("practice.png",),
)
