"""One HTML file of everything that was measured on a set: tables, plots, worst and best images. Nothing beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from common.disk import write_atomically, write_json
from common.errors import InputError
from evaluation.filter import read_fidelity
from evaluation.memorisation import MemorisationReport
from evaluation.output import new_figure, show_image
from synthetic.manifest import FIDELITY_COLUMN
from synthetic.reader import Sample, SampleSet

Table = tuple[Sequence[str], list[Sequence[object]]]  # header and rows
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #999; font-weight: 600; }
img { max-width: 100%; height: auto; } p.note { color: #555; max-width: 48rem; }
footer { color: #777; margin-top: 3rem; }
"""

# --- tables ----------------------------------------------------------------------------------------------------------


def _fidelity_table(content: dict) -> Table:
    synthetic, real = content["synthetic"], content["real"]
    rows = [["Dice of the cells", synthetic["dice"], real["dice"]]]
    for number, values in enumerate(zip(synthetic["iou"], real["iou"], strict=True)):
        rows.append([f"IoU of class {number}", *values])
    rows += [[f"AP at IoU {name}", value, real["ap"][name]] for name, value in synthetic["ap"].items()]
    rows.append(["panoptic quality", synthetic["pq"], real["pq"]])
    rows.append(["boundary F", synthetic["boundary_f"], real["boundary_f"]])
    rows.append(["count error per image", synthetic["count_error"], real["count_error"]])
    rows.append(["images", synthetic["images"], real["images"]])
    return ["", "synthetic", f"real ({content['real_images_are']})"], rows


def _threshold_table(content: dict) -> Table:
    rows = [
        ["Dice with the mask", content["dice_synthetic"], content["dice_real"]],
        ["mean gray value", content["mean_synthetic"], content["mean_real"]],
        ["standard deviation of gray values", content["std_synthetic"], content["std_real"]],
        ["images compared", content["compared"], content["compared"] if content["dice_real"] is not None else None],
    ]
    return ["", "synthetic", "real images of the same masks"], rows


def _grid_table(content: dict) -> Table:
    title = f"steps across borders of {content['patch_pixels']} pixel patches / steps inside"
    return ["", "synthetic", "real images of the same masks"], [
        [title, content["grid_synthetic"], content["grid_real"]]
    ]


def _realism_table(content: dict) -> Table:
    rows = []
    for one in content["distances"]:
        for title, kind in (("synthetic - real", "synthetic"), ("real - real", "real")):
            rows.append([f"{one['name']}, {title}", one[f"{kind}_mean"], one[f"{kind}_std"], one["images_compared"]])
        rows.append([f"{one['name']}, all images", one["whole"], None, None])
    return ["", "mean", "standard deviation", "images on each side"], rows


def _population_table(content: dict) -> Table:
    rows = [
        [one["title"], one["synthetic_mean"], one["real_mean"], one["distance"], one["real_distance"], one["relative"]]
        for one in content["quantities"].values()
    ]
    return ["", "synthetic, mean", "real, mean", "distance", "real - real", "distance / real std"], rows


def _memorisation_table(content: dict) -> Table:
    rows = []
    for title, values in (("synthetic images", content["samples"]), (content["reference_is"], content["reference"])):
        known = [value for value in values if value is not None]
        rows.append([title, *(np.percentile(known, [0, 5, 50]).tolist() if known else [None] * 3), len(known)])
    return ["distance to the nearest training image", "least", "5 %", "median", "images"], rows


def _memorisation_words(content: dict) -> list[str]:
    return MemorisationReport(**content).words()[:-1]


def _utility_table(content: dict) -> Table:
    rows = []
    for one in content["summary"]:
        scores = [_with_spread(one[name], one[f"{name}_std"]) for name in ("dice", "ap50", "pq")]
        gain = None if one["arm"] == "real" else _with_spread(one["gain"], one["gain_std"])
        rows.append([f"{one['share']} % of the labels, {one['arm']}", *scores, gain, one["seeds"]])
    return ["trained on", "Dice", "AP at IoU 0.5", "panoptic quality", "gain in Dice", "seeds"], rows


def _with_spread(mean: float | None, spread: float | None) -> str | None:
    if mean is None:
        return None
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _sweep_table(content: dict) -> Table:
    names = ("fidelity", "distance", "mean", "std", "network_calls")
    rows = [[one["name"], *(one[name] for name in names)] for one in content["rows"]]
    rows.append(["real images", *(content[f"real_{name}"] for name in names[:4]), None])
    return ["", "fidelity", "distance", "mean gray", "std of gray", "network calls"], rows


def _filter_table(content: dict) -> Table:
    return ["", "images", f"mean {FIDELITY_COLUMN}"], [
        ["all", content["kept"] + content["dropped"], content["mean_before"]],
        [f"kept: {content['rule']}", content["kept"], content["mean_after"]],
    ]


@dataclass(frozen=True)
class Section:
    """One measure in the report: its JSON, what it means, how it becomes a table, its pictures."""

    name: str
    title: str
    note: str
    table: Callable[[dict], Table]
    pictures: tuple[str, ...] = ()
    words: Callable[[dict], list[str]] = lambda content: []


SECTIONS = (
    Section(
        "fidelity",
        "Does it follow the mask: a segmenter that knows real cells only",
        "A small U-Net that learned from real pairs segments the images; its answer is compared with the masks. Real "
        "images that it has not seen are the ceiling. Higher is better, but for the count error.",
        _fidelity_table,
    ),
    Section(
        "threshold",
        "Does it follow the mask: bright against dark",
        "Otsu's threshold of each image against its mask. High contrast raises the Dice, so mean and standard "
        "deviation of the gray values stand beside it.",
        _threshold_table,
        ("threshold.png",),
    ),
    Section(
        "grid",
        "Do the network's patches show",
        "The mean difference of neighbouring pixels across the borders of the network's patches, over the same inside "
        "the patches. 1 is no grid; real images are measured at the same places.",
        _grid_table,
    ),
    Section(
        "realism",
        "Is it real: distances of features",
        "Synthetic to real images beside real to real ones, over random splits with the same number of images. A set "
        "that cannot be told from real ones has the distance of real to real.",
        _realism_table,
        ("realism.png",),
    ),
    Section(
        "population",
        "Are the cells alike",
        "Means, and Wasserstein distances beside those of random halves of the real images. Numbers and shapes are "
        "those of the masks, brightness, contrast and texture those of the images.",
        _population_table,
        ("population.png",),
    ),
    Section(
        "memorisation",
        "Does it repeat its training images",
        "0 is a copy in any turn, flip, brightness or contrast; 1.4 are unrelated images. The picture shows the "
        "closest pairs, synthetic left, training image right.",
        _memorisation_table,
        ("memorisation.png",),
        _memorisation_words,
    ),
    Section("filter", "Filter", "The set itself is unchanged; see kept.csv and dropped.csv.", _filter_table),
    Section(
        "utility",
        "Does it help: a segmenter trained on it, tested on real images",
        "Mean and standard deviation over the seeds; the same number of steps in every arm. Gain is the Dice over that "
        "of real images alone at the same share of the labels, seed by seed.",
        _utility_table,
        ("utility.png",),
    ),
    Section(
        "sweep",
        "Guidance and solver",
        "Fidelity: Dice of the judge with the masks. Distance: Frechet distance of its features to real images.",
        _sweep_table,
        ("sweep.png",),
        lambda content: [f"Recommended: {content['recommended_flags']}"],
    ),
)
ELSEWHERE = ("utility", "sweep")  # about more than one set: in folders of their own

# --- the page --------------------------------------------------------------------------------------------------------


def write_report(
    samples: SampleSet, images: int = 8, others: Mapping[str, Path] | None = None
) -> tuple[Path, list[str], list[str]]:
    """Write ``report.html`` and ``report.json`` into ``SAMPLE_DIR/evaluation``.

    Args:
        samples: a set on which at least one measure has run.
        images: worst and best images by fidelity, each.
        others: "utility" and "sweep" -> the folders with their results.

    Returns:
        The page, the measures in it and those that have not run.

    Raises:
        InputError: nothing was measured yet, or a result is damaged.
    """
    folder = samples.folder / "evaluation"
    folders = dict.fromkeys((section.name for section in SECTIONS), folder) | dict(others or {})
    contents = {name: _read(path / f"{name}.json") for name, path in folders.items()}
    absent = [name for name in others or {} if contents[name] is None]
    if absent:
        raise InputError(
            f"--{absent[0]} {folders[absent[0]]} holds no {absent[0]}.json; give the folder of its results"
        )
    found = [name for name, content in contents.items() if content is not None]
    if not found:
        raise InputError(f"{folder} holds no results: run evaluate.py fidelity or another measure on the set first")
    folder.mkdir(exist_ok=True)
    parts = [f"<h1>{escape(samples.folder.name)}: {len(samples)} synthetic images</h1>", _provenance(samples)]
    for section in SECTIONS:
        content = contents[section.name]
        if content is not None:
            parts += _section(section, content, folders[section.name])
            if section.name == "fidelity" and FIDELITY_COLUMN in samples.columns:
                parts += _extremes(samples, images)
    missing = [section.name for section in SECTIONS if section.name not in (*found, *ELSEWHERE)]
    if missing:
        parts.append(f"<footer>Not measured: {escape(', '.join(missing))}.</footer>")
    page = folder / "report.html"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(samples.folder.name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_atomically(page, lambda file: file.write(text.encode()))
    results = {name: contents[name] for name in found}
    write_json(page.with_suffix(".json"), {"set": samples.folder.name, "images": len(samples), "measures": results})
    return page, found, missing


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); run the measure again") from error


def _section(section: Section, content: dict, folder: Path) -> list[str]:
    try:
        table, words = section.table(content), section.words(content)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / section.name}.json was written by another version (no {error}); run evaluate.py {section.name} "
            "again"
        ) from error
    parts = [f'<h2 id="{section.name}">{escape(section.title)}</h2>', f'<p class="note">{escape(section.note)}</p>']
    parts.append(html_table(*table))
    parts += [f"<p>{escape(line)}</p>" for line in words]
    pictures = [folder / name for name in section.pictures if (folder / name).is_file()]
    return parts + [embedded(path.read_bytes(), f"picture of {section.name}") for path in pictures]


def html_table(header: Sequence[str], rows: list[Sequence[object]]) -> str:
    """A table; floats with four significant digits, a dash for None."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def embedded(png: bytes, title: str) -> str:
    """An image inside of the page."""
    data = base64.b64encode(png).decode()
    return f'<p><img alt="{escape(title)}" src="data:image/png;base64,{data}"></p>'


def _provenance(samples: SampleSet) -> str:
    rows = [[name, ", ".join(values)] for name, values in samples.provenance().items()]
    return html_table(["made with", ""], rows) if rows else ""


def _extremes(samples: SampleSet, images: int) -> list[str]:
    """The worst and the best images by fidelity, with the outlines of their masks; a best one shows a cell."""
    values = read_fidelity(samples)
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    with_cells = (index for index in reversed(order) if samples.foreground(samples.samples[index]).any())
    best = list(islice(with_cells, images)) or order[::-1][:images]
    parts = []
    for title, chosen in (("worst", order[:images]), ("best", best)):
        parts.append(f"<p>{title} by {FIDELITY_COLUMN}; outlined: the mask</p>")
        parts.append(embedded(draw_grid(samples, [(samples.samples[i], values[i]) for i in chosen]), f"{title} images"))
    return parts


def draw_grid(samples: SampleSet, chosen: list[tuple[Sample, float]]) -> bytes:
    """Synthetic images with their mask's outline, the real ones of the same masks below where there are any; PNG."""
    columns = min(4, len(chosen))
    per_image = 2 if samples.has_real else 1
    rows = -(-len(chosen) // columns) * per_image
    figure = new_figure(2.6 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for place, (sample, value) in enumerate(chosen):
        row, column = place // columns * per_image, place % columns
        cells = samples.foreground(sample)
        show_image(axes[row, column], samples.synthetic(sample), f"{sample.name[:24]}, {value:.2f}", cells)
        if samples.has_real:
            show_image(axes[row + 1, column], samples.real(sample), "real image of the mask", cells)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    compact = io.BytesIO()  # a palette is a third of the size and no eye sees it
    Image.open(buffer).convert("RGB").quantize(256).save(compact, format="PNG", optimize=True)
    return compact.getvalue()
