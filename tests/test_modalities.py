"""The comparison of generators for several modalities: which images each fold trains on and holds out."""

from __future__ import annotations

import csv

import pytest
from drawn_sets import five_rows, write_set
from PIL import Image

from benchmarks import modalities

FIELDS = {"fluorescence": 4, "purple_on_purple": 5, "purple_on_white": 3, "brightfield": 2}  # of two images each


@pytest.fixture
def index(tmp_path):
    """Rows of index.csv; the last field of each modality is the validation split."""
    rows = []
    for modality, count in FIELDS.items():
        for field in range(count):
            split = "val" if field == count - 1 else "train"
            for part in "ab":
                row = {"name": f"{modality}_{field}{part}.png", "split": split, "modality": modality}
                rows.append(row | {"mosaic_group": f"{modality}{field}"})
                for kind in ("images", "instances"):
                    path = tmp_path / "data" / "nuclei" / split / kind / rows[-1]["name"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("L", (4, 4)).save(path)
    with (tmp_path / "data" / "nuclei" / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_each_field_of_a_rare_modality_is_held_out_once_and_fluorescence_keeps_its_split(index, tmp_path):
    args = modalities.parse_args(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")])
    tested: dict[str, list[str]] = {modality: [] for modality in FIELDS}
    for part in range(args.folds):
        fold = modalities.Fold(index, part, args)
        trained = {path.name for path in (fold.folder / "train" / "images").iterdir()}
        for modality in FIELDS:
            held_out = {path.name for path in (fold.folder / f"test_{modality}" / "images").iterdir()}
            own = {path.name for path in (fold.folder / f"train_{modality}" / "images").iterdir()}
            assert (
                not held_out & trained
                and own == {row["name"] for row in index if row["modality"] == modality} - held_out
            )
            assert own <= trained and {name[:-5] for name in own}.isdisjoint(name[:-5] for name in held_out)
            tested[modality] += held_out
    for modality in FIELDS:
        names = sorted(row["name"] for row in index if row["modality"] == modality)
        last = [row["name"] for row in index if row["modality"] == modality and row["split"] == "val"]
        assert sorted(tested[modality]) == (sorted(2 * last) if modality == "fluorescence" else names)


def test_the_picture_shows_real_images_and_every_generator_that_has_all_modalities(tmp_path):
    for arm in ("one, no looks", "one each"):
        for modality in modalities.MODALITIES:
            write_set(tmp_path / "fold_0" / f"samples_{modalities.named(arm)}_{modality}", five_rows(64))
    write_set(tmp_path / "fold_0" / "samples_one_looks_fluorescence", five_rows(64))
    modalities.write_picture(tmp_path)
    with Image.open(tmp_path / "kinds.png") as picture:
        assert picture.width > 12 * 128 and 3 * 128 <= picture.height < 4 * 128
