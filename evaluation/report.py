"""Report: one self-contained HTML file with all measures of a set: tables, plots, worst and best images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from common.disk import write_bytes, write_json
from common.errors import InputError
from common.plain import WRONG, read_json
from evaluation import fidelity, filter, grid, looks, memorisation, population, realism, sweep, threshold
from evaluation.experiments import trial_report
from evaluation.filter import read_fidelity
from evaluation.output import RESULTS, Section, Table, new_figure, results_folder, show_image
from synthetic.manifest import FIDELITY_COLUMN
from synthetic.reader import Sample, SampleSet

MEASURES = (fidelity, threshold, grid, realism, population, looks, memorisation, filter, trial_report, sweep)
SECTIONS = tuple(measure.SECTION for measure in MEASURES)
ELSEWHERE = ("utility", "sweep")  # these compare several sets, so their results are in other folders
TEMPLATE = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
).get_template("report.html.jinja")

# --- the page --------------------------------------------------------------------------------------------------------


def write_report(
    samples: SampleSet, images: int = 8, others: Mapping[str, Path] | None = None
) -> tuple[Path, list[str], list[str]]:
    """Write ``report.html`` and ``report.json`` into ``SAMPLE_DIR/evaluation``.

    Args:
        samples: a set on which at least one measure has run.
        images: number of worst images, and number of best images, by fidelity.
        others: "utility" and "sweep" -> folders with their results.

    Returns:
        The path of the page, the measures in it, and the measures that have not run.

    Raises:
        InputError: no measure has run, or a result is damaged.
    """
    folder = samples.folder / RESULTS
    folders = dict.fromkeys((section.name for section in SECTIONS), folder) | dict(others or {})
    contents = {name: _read(path / f"{name}.json") for name, path in folders.items()}
    absent = [name for name in others or {} if contents[name] is None]
    if absent:
        raise InputError(
            f"{folders[absent[0]]} holds no {absent[0]}.json; give the folder with the results of {absent[0]}"
        )
    found = {name: content for name, content in contents.items() if content is not None}
    if not found:
        raise InputError(f"{folder} holds no results: first run evaluate.py fidelity or another measure on the set")
    parts = [_part(one, found[one.name], folders[one.name]) for one in SECTIONS if one.name in found]
    for part in parts:
        if part["section"] is fidelity.SECTION and FIDELITY_COLUMN in samples.columns:
            part["pictures"] += _extremes(samples, images)
    missing = [one.name for one in SECTIONS if one.name not in (*found, *ELSEWHERE)]
    text = TEMPLATE.render(
        name=samples.folder.name,
        images=len(samples),
        provenance=Table(["made with", ""], [[name, ", ".join(v)] for name, v in samples.provenance().items()]),
        parts=parts,
        missing=missing,
    )
    page = results_folder(samples) / "report.html"
    write_bytes(page, text.encode())
    write_json(page.with_suffix(".json"), {"set": samples.folder.name, "images": len(samples), "measures": found})
    return page, list(found), missing


def write_page(title: str, sections: Sequence[tuple[Section, dict, Path]], path: Path) -> Path:
    """Write one HTML file with results that compare several sets.

    Args:
        sections: (section, content, folder of its pictures) each.

    Returns:
        ``path``.
    """
    parts = [_part(*one) for one in sections]
    text = TEMPLATE.render(name=title, parts=parts)
    write_bytes(path, text.encode())
    return path


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    return read_json(path, "run the measure again")


def _part(section: Section, content: dict, folder: Path) -> dict:
    """Variables of the template for one measure."""
    try:
        table, notes = section.table(content), section.notes(content)
    except WRONG as error:
        raise InputError(
            f"{folder / section.name}.json was written by another version (no {error}); run evaluate.py {section.name} "
            "again"
        ) from error
    pictures = [("", _base64((folder / name).read_bytes())) for name in section.pictures if (folder / name).is_file()]
    return {"section": section, "table": table, "notes": notes, "pictures": pictures}


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _extremes(samples: SampleSet, images: int) -> list[tuple[str, str]]:
    """Pictures of the worst and the best images by fidelity. If possible, only images with a cell count as best."""
    values = read_fidelity(samples)
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    with_cells = (index for index in reversed(order) if samples.foreground(samples.samples[index]).any())
    best = list(islice(with_cells, images)) or order[::-1][:images]
    pictures = []
    for title, chosen in (("worst", order[:images]), ("best", best)):
        png = draw_grid(samples, [(samples.samples[index], values[index]) for index in chosen])
        pictures.append((f"{title} images by {FIDELITY_COLUMN}, with the outline of the mask", _base64(png)))
    return pictures


def draw_grid(samples: SampleSet, chosen: list[tuple[Sample, float]]) -> bytes:
    """PNG of synthetic images with the outlines of their masks, above the real images of the masks if there are any."""
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
    compact = io.BytesIO()  # a palette takes a third of the bytes, without a visible difference
    Image.open(buffer).convert("RGB").quantize(256).save(compact, format="PNG", optimize=True)
    return compact.getvalue()
