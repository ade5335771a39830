"""make_masks.py: simulated nuclei, recombined layouts, and the folders they are written to."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from script_helpers import call, run_here

import common.log
import make_masks
from common.cells import touches_border
from common.errors import InputError
from layouts import nuclei, placing, recombine, statistics

ROOT = Path(__file__).parents[1]
NUCLEI = Path(__file__).parents[2] / "shared" / "data" / "nuclei" / "train" / "instances"


def nuclei_settings(**changes) -> nuclei.NucleiSettings:
    settings = {
        "height": 96, "width": 160, "cell_size": 16.0, "size_spread": 0.2, "elongation": 1.35, "irregularity": 0.04,
        "density": 0.2, "density_spread": 0.0, "touching": True, "render": False, "seed": 0,
    }  # fmt: skip
    return nuclei.NucleiSettings(**{**settings, **changes})


def layout_settings(**changes) -> recombine.LayoutSettings:
    settings = {
        "height": 96, "width": 160, "density": None, "density_scale": 1.0, "scale_low": 1.0, "scale_high": 1.0,
        "rotate": "none", "clusters": True, "gap": 1, "max_overlap": 0.0, "components": False, "seed": 0,
        "source_sha256": "",
    }  # fmt: skip
    return recombine.LayoutSettings(**{**settings, **changes})


def run(*arguments: object) -> None:
    make_masks.main(make_masks.parse_args([str(argument) for argument in arguments]))


def simulate(output: Path, *arguments: object) -> None:
    run("simulate", "--output", output, "--image-size", 48, 64, "--cell-size", 10, *arguments)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def read_png(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def disks(shape: tuple[int, int], centres_and_radii: list[tuple[float, float, float]]) -> np.ndarray:
    """Instance map of disks, numbered in the order given."""
    rows, columns = np.indices(shape)
    instance_map = np.zeros(shape, np.int32)
    for number, (row, column, radius) in enumerate(centres_and_radii, start=1):
        instance_map[np.hypot(rows - row, columns - column) <= radius] = number
    return instance_map


def write_instances(folder: Path, maps: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, instance_map in maps.items():
        Image.fromarray(instance_map.astype(np.uint16)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def lab(tmp_path) -> Path:
    """Three source images: lone disks, a touching pair (a small disk on a large one), and a cut disk."""
    lone = disks((80, 100), [(20, 20, 6), (20, 60, 8), (55, 30, 5), (50, 75, 7)])
    pair = disks((80, 100), [(40, 40, 10), (40, 55, 5), (15, 80, 6)])
    cut = disks((80, 100), [(0, 50, 12), (50, 50, 6)])
    return write_instances(tmp_path / "lab", {"a": lone, "b": pair, "c": cut})


# --- simulated nuclei ---


def test_files_are_equal_byte_for_byte_whatever_the_count_the_process_or_an_interruption(tmp_path):
    simulate(tmp_path / "once", "--count", 5, "--render", "--seed", 3)
    command = [sys.executable, "make_masks.py", "simulate", "--output", tmp_path / "parts", "--count", "2", "--render"]
    command += ["--image-size", "48", "64", "--cell-size", "10", "--seed", "3"]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "parts" / "images" / "sim_000001.png").unlink()
    simulate(tmp_path / "parts", "--count", 5, "--render", "--seed", 3)
    once = files_of(tmp_path / "once")
    assert len(once) == 15
    assert files_of(tmp_path / "parts") == once
    assert (tmp_path / "parts" / "statistics.csv").read_bytes() == (tmp_path / "once" / "statistics.csv").read_bytes()


def test_another_seed_gives_other_masks():
    first, _ = nuclei.simulate_field(nuclei_settings(seed=0), 0)
    assert not np.array_equal(first, nuclei.simulate_field(nuclei_settings(seed=1), 0)[0])
    assert not np.array_equal(first, nuclei.simulate_field(nuclei_settings(seed=0), 1)[0])


def test_masks_do_not_depend_on_whether_images_are_drawn(tmp_path):
    simulate(tmp_path / "plain", "--count", 2)
    simulate(tmp_path / "render", "--count", 2, "--render")
    plain, render = files_of(tmp_path / "plain"), files_of(tmp_path / "render")
    assert len(plain) == 4
    assert plain == {name: render[name] for name in plain}


def test_a_set_holds_16_bit_instances_the_same_pixels_as_mask_and_an_8_bit_image(tmp_path):
    simulate(tmp_path / "set", "--count", 3, "--render")
    for index in range(3):
        kinds = {kind: tmp_path / "set" / kind / f"sim_{index:06d}.png" for kind in ("instances", "masks", "images")}
        instances, mask, image = (read_png(path) for path in kinds.values())
        assert instances.dtype == np.uint16
        assert instances.shape == mask.shape == image.shape == (48, 64)
        assert np.array_equal(np.unique(instances), np.arange(instances.max() + 1))
        assert mask.dtype == image.dtype == np.uint8
        assert np.array_equal(mask, np.where(instances > 0, 255, 0))
    assert not list((tmp_path / "set").rglob("*.tmp"))


def test_a_nucleus_has_the_area_of_the_circle_that_was_asked_for():
    settings = nuclei_settings(size_spread=0.0, cell_size=24.0)
    rng = np.random.default_rng(0)
    areas = [nuclei.draw_nucleus(rng, settings).area for _ in range(50)]
    assert np.allclose(areas, math.pi * 12**2, rtol=0.03)


def test_a_round_regular_nucleus_is_a_disk():
    settings = nuclei_settings(size_spread=0.0, cell_size=30.0, elongation=1.0, irregularity=0.0)
    piece = nuclei.draw_nucleus(np.random.default_rng(0), settings)
    rows, columns = np.nonzero(piece.labels)
    distance = np.hypot(rows - rows.mean(), columns - columns.mean())
    assert distance.max() == pytest.approx(15, abs=1)


@pytest.mark.parametrize(("touching", "density"), [(True, 0.15), (True, 0.5), (False, 0.15), (False, 0.35)])
def test_a_set_shows_what_was_asked_for(touching, density):
    settings = nuclei_settings(height=160, width=200, touching=touching, density=density, density_spread=0.2)
    found = statistics.summarize(statistics.measure(nuclei.simulate_field(settings, n)[0]) for n in range(10))
    assert found["foreground share, mean"] == pytest.approx(density, rel=0.06)
    assert found["foreground share, standard deviation"] == pytest.approx(0.2 * density, rel=0.3)
    assert found["cell diameter in pixels, mean"] == pytest.approx(16, rel=0.06)
    assert found["elongation, mean"] == pytest.approx(1.35, abs=0.08)


def test_cells_touch_only_where_that_is_allowed():
    for index in range(4):
        apart, _ = nuclei.simulate_field(nuclei_settings(density=0.4, touching=False), index)
        assert len(recombine.touching_pairs(apart)) == 0
        together, _ = nuclei.simulate_field(nuclei_settings(density=0.4, touching=True), index)
        assert len(recombine.touching_pairs(together)) > 0


def test_every_cell_is_one_connected_part_even_where_cells_crowd():
    instance_map, _ = nuclei.simulate_field(nuclei_settings(density=0.6), 0)
    for cell_id in range(1, instance_map.max() + 1):
        assert ndimage.label(instance_map == cell_id, np.ones((3, 3)))[1] == 1


def test_cells_reach_over_the_border_and_the_border_is_as_full_as_the_middle():
    maps = np.stack([nuclei.simulate_field(nuclei_settings(), n)[0] > 0 for n in range(60)])
    border = np.concatenate(
        [maps[:, :3].ravel(), maps[:, -3:].ravel(), maps[:, :, :3].ravel(), maps[:, :, -3:].ravel()]
    )
    assert border.mean() == pytest.approx(0.2, abs=0.04)


def test_rendered_nuclei_stand_where_the_mask_says():
    settings = nuclei_settings(render=True)
    for index in range(3):
        instance_map, level = nuclei.simulate_field(settings, index)
        image = nuclei.render_image(instance_map, level, settings.cell_size, np.random.default_rng(index))
        cells = instance_map > 0
        bright = image > (image[cells].mean() + image[~cells].mean()) / 2
        assert 2 * np.count_nonzero(bright & cells) / (np.count_nonzero(bright) + np.count_nonzero(cells)) > 0.9
        assert image[cells].std() > 10  # texture, and cells of their own brightness


# --- measuring ---


def test_drawn_shapes_are_measured_as_drawn():
    rows, columns = np.indices((90, 120))
    instance_map = disks((90, 120), [(30, 30, 10), (30, 46, 5), (0, 90, 8)])
    instance_map[((rows - 65) / 8) ** 2 + ((columns - 60) / 24) ** 2 <= 1] = 4
    found = statistics.measure(instance_map)
    assert found.cells == 4
    assert found.touching == 2
    assert found.foreground == np.count_nonzero(instance_map) / (90 * 120)
    assert found.areas == pytest.approx([math.pi * 100, math.pi * 25, math.pi * 8 * 24], rel=0.05)  # not the cut one
    assert found.elongations == pytest.approx([1, 1, 3], rel=0.05)


def test_weights_undo_that_the_border_cuts_large_cells_more_often():
    height, width = 60, 80
    counts = {}
    for size in (6, 30):  # squares at every position that meets the image: how many lie whole in it
        tops, lefts = np.arange(1 - size, height), np.arange(1 - size, width)
        whole = np.count_nonzero((tops >= 0) & (tops + size <= height)) * np.count_nonzero(
            (lefts >= 0) & (lefts + size <= width)
        )
        share = recombine.share_seen_whole(np.array([[0, size, 0, size]]), (height, width))[0]
        counts[size] = whole / share
    assert counts[30] == pytest.approx(counts[6], rel=0.1)  # equal numbers per area, whatever the size


def test_an_empty_field_is_measured_without_warning_and_shown_without_nan(tmp_path):
    found = statistics.summarize([statistics.measure(np.zeros((20, 30), np.int32))])
    assert found["foreground share, mean"] == 0
    assert found["share of cells that touch another"] == 0
    assert math.isnan(found["elongation, mean"])
    shown = statistics.write_summary(tmp_path / "summary.csv", {"made": found, "asked for": {}})
    assert "nan" not in shown + (tmp_path / "summary.csv").read_text()


def test_cells_that_meet_at_a_corner_touch():
    instance_map = np.array([[1, 0, 0, 3], [0, 2, 0, 3], [0, 0, 0, 0], [4, 4, 5, 0]])
    assert recombine.touching_pairs(instance_map).tolist() == [[1, 2], [4, 5]]


def test_groups_are_connected_and_no_larger_than_allowed():
    chain = np.array([[1, 2], [2, 3], [3, 4], [4, 5], [8, 9]])
    assert recombine.group_cells([1, 2, 3, 4, 5, 7, 8], chain, 3) == [[1, 2, 3], [4, 5], [7], [8]]


def test_tidy_keeps_the_largest_part_drops_scraps_and_closes_gaps():
    instance_map = np.zeros((20, 20), np.int32)
    instance_map[2:8, 2:8] = 7
    instance_map[15:18, 15:18] = 7
    instance_map[12, 2:4] = 3
    instance_map[10:14, 8:12] = 5
    tidied = placing.tidy(instance_map)
    assert np.array_equal(tidied == 1, instance_map == 5)
    assert np.count_nonzero(tidied == 2) == 36
    assert tidied.max() == 2


# --- recombined layouts ---


def shapes_in(instance_map: np.ndarray) -> set[bytes]:
    """Every whole cell as it looks, wherever it lies."""
    boxes, cut = ndimage.find_objects(instance_map), touches_border(instance_map)
    cells = [instance_map[box] == number for number, box in enumerate(boxes, start=1) if number not in cut]
    return {np.array(cell.shape).tobytes() + cell.tobytes() for cell in cells}


def test_every_whole_cell_of_a_layout_is_a_cell_of_the_source(lab):
    maps = recombine.read_sources(lab, components=False)
    layouts = recombine.Layouts([recombine.cut_pieces(item, True) for item in maps.values()], layout_settings())
    known = set.union(*(shapes_in(item) for item in maps.values()))
    for index in range(5):
        made = layouts.maps(index)[0]
        assert made.shape == (96, 160)
        assert made.max() > 0
        assert shapes_in(made) <= known


def test_touching_cells_stay_together_and_are_parted_on_request(lab):
    pair = recombine.read_sources(lab, components=False)["b"]
    assert sorted(piece.labels.max() for piece in recombine.cut_pieces(pair, clusters=True).pieces) == [1, 2]
    assert [piece.labels.max() for piece in recombine.cut_pieces(pair, clusters=False).pieces] == [1, 1, 1]


def test_cells_that_the_border_cuts_are_not_used(lab):
    pieces = recombine.cut_pieces(recombine.read_sources(lab, components=False)["c"], clusters=True).pieces
    assert [piece.area for piece in pieces] == [np.count_nonzero(disks((80, 100), [(50, 50, 6)]))]


@pytest.mark.parametrize("gap", [1, 4])
def test_the_gap_between_pieces_is_kept(lab, gap):
    sources = [recombine.cut_pieces(item, True) for item in recombine.read_sources(lab, False).values()]
    layouts = recombine.Layouts(sources, layout_settings(gap=gap, density=0.3, clusters=False))
    lone = recombine.Layouts([sources[0]], layout_settings(gap=gap, density=0.3)).maps(0)[0]
    for cell_id in range(1, lone.max() + 1):
        cell = lone == cell_id
        halo = ndimage.binary_dilation(cell, np.ones((3, 3)), iterations=gap)
        assert not np.any((lone > 0) & halo & ~cell)
    assert layouts.maps(0)[0].max() > 0


def test_overlap_hides_no_more_of_a_cell_than_allowed():
    source = recombine.cut_pieces(disks((40, 40), [(20, 20, 8)]), clusters=True)
    area = np.count_nonzero(disks((40, 40), [(20, 20, 8)]))
    settings = layout_settings(gap=0, max_overlap=0.3, density=0.6)
    made = recombine.Layouts([source], settings).maps(0)[0]
    inner = np.setdiff1d(np.unique(made), np.append(touches_border(made), 0))
    areas = np.bincount(made.ravel())[inner]
    assert areas.min() < area  # some are hidden in part
    assert areas.min() >= 0.7 * area - 1


def test_density_follows_the_source_or_the_flag(lab):
    sources = [recombine.cut_pieces(item, True) for item in recombine.read_sources(lab, False).values()]
    from_data = recombine.Layouts(sources, layout_settings())
    shares = [np.mean(from_data.maps(index)[0] > 0) for index in range(30)]
    assert np.mean(shares) == pytest.approx(np.mean([source.foreground for source in sources]), rel=0.1)
    fixed = recombine.Layouts(sources, layout_settings(density=0.25))
    assert np.mean([np.mean(fixed.maps(index)[0] > 0) for index in range(20)]) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (6, 3), (8, 2)])
def test_quarter_turns_move_pixels_and_change_none(shape):
    labels = np.random.default_rng(1).integers(0, 4, shape).astype(np.int32)
    labels[0, 0] = labels[-1, -1] = 3
    piece = placing.Piece(labels, np.zeros(shape, np.float32))
    turned = {np.rot90(side, turns).tobytes() for side in (labels, labels[:, ::-1]) for turns in range(4)}
    seen = set()
    for seed in range(60):
        result = recombine.turn_and_scale(piece, np.random.default_rng(seed), layout_settings(rotate="quarter")).labels
        rows, columns = np.nonzero(result)
        source_rows, source_columns = np.nonzero(labels)
        full = np.pad(result, 8)
        top, left = rows.min() + 8, columns.min() + 8
        candidates = []
        for high, wide in (shape, shape[::-1]):
            for down in range(3):
                for right in range(3):
                    window = full[top - down : top - down + high, left - right : left - right + wide]
                    if np.count_nonzero(window) == len(source_rows) and window.tobytes() in turned:
                        candidates.append(window.tobytes())
        assert candidates
        seen.update(candidates)
    assert seen == turned


# --- classes ---


@pytest.fixture
def class_maps(lab, tmp_path) -> Path:
    """Class maps of the cells of ``lab``: 200 in the upper half of each cell, 7 below."""
    found = {}
    for name, cells in recombine.read_sources(lab, components=False).items():
        found[name] = np.zeros(cells.shape, np.uint8)
        for number, (rows, columns) in enumerate(ndimage.find_objects(cells), start=1):
            middle = (rows.start + rows.stop) // 2
            for part, value in ((slice(rows.start, middle), 200), (slice(middle, rows.stop), 7)):
                found[name][part, columns][cells[part, columns] == number] = value
    return write_instances(tmp_path / "classes", found)


def recombine_classes(lab: Path, class_maps: Path, output: Path, *words: object) -> list[tuple[np.ndarray, np.ndarray]]:
    run("recombine", "--instances", lab, "--classes", class_maps, "--output", output, "--count", 4, *words)
    names = sorted(path.name for path in (output / "classes").iterdir())
    return [(read_png(output / "instances" / name), read_png(output / "classes" / name)) for name in names]


def looks_of_cells(cells: np.ndarray, classes: np.ndarray) -> set[bytes]:
    """The classes of every whole cell, wherever it lies."""
    boxes, cut = ndimage.find_objects(cells.astype(int)), touches_border(cells)
    whole = [(box, cells[box] == number) for number, box in enumerate(boxes, start=1) if number not in cut]
    return {np.where(inside, classes[box], 0).astype(np.uint8).tobytes() for box, inside in whole}


def test_cells_keep_the_classes_of_their_pixels(lab, class_maps, tmp_path):
    known, shown = set(), set()
    for name, cells in recombine.read_sources(lab, components=False).items():
        known |= looks_of_cells(cells, read_png(class_maps / f"{name}.png"))
    for cells, classes in recombine_classes(lab, class_maps, tmp_path / "out", "--rotate", "none", "--scale", 1, 1):
        np.testing.assert_array_equal(classes > 0, cells > 0)
        shown |= looks_of_cells(cells, classes)
        assert classes.dtype == np.uint16
    assert len(shown) >= 3 and shown <= known


def test_classes_turn_and_grow_with_their_cells(lab, class_maps, tmp_path):
    shares = []
    for cells, classes in recombine_classes(lab, class_maps, tmp_path / "out", "--scale", 1.5, 2, "--density", 0.2):
        np.testing.assert_array_equal(classes > 0, cells > 0)
        assert set(np.unique(classes)) <= {0, 7, 200}
        inside = np.setdiff1d(np.unique(cells), [0, *touches_border(cells)])
        shares += [np.mean(classes[cells == number] == 200) for number in inside]
    assert len(shares) > 5 and np.abs(np.array(shares) - 0.5).max() < 0.1


def test_connected_parts_of_class_maps_are_cells(class_maps, tmp_path):
    run("recombine", "--instances", class_maps, "--components", "--classes", class_maps, "--output", tmp_path / "out",
        "--count", 1, "--density", 0.2)  # fmt: skip
    assert set(np.unique(read_png(tmp_path / "out" / "classes" / "mix_000000.png"))) == {0, 7, 200}


def test_classes_move_no_cell_and_sets_of_earlier_versions_are_continued(lab, class_maps, tmp_path):
    run("recombine", "--instances", lab, "--output", tmp_path / "plain", "--count", 4)
    recombine_classes(lab, class_maps, tmp_path / "out")
    assert files_of(tmp_path / "plain" / "instances") == files_of(tmp_path / "out" / "instances")
    settings = json.loads((tmp_path / "plain" / "settings.json").read_text())
    earlier = {name: value for name, value in settings.items() if name not in ("classes_sha256", "crop", "single")}
    (tmp_path / "plain" / "settings.json").write_text(json.dumps(earlier))
    run("recombine", "--instances", lab, "--output", tmp_path / "plain", "--count", 5)
    with pytest.raises(InputError, match="classes_sha256"):
        run("recombine", "--instances", lab, "--output", tmp_path / "out", "--count", 4)


@pytest.mark.parametrize("words", [["--scale", 1, 1], ["--scale", 2, 2]])
def test_thin_classes_stay_when_cells_turn(tmp_path, words):
    cells = disks((60, 60), [(30, 30, 16)])
    classes = np.where(disks((60, 60), [(30, 30, 14)]), 1, 300) * (cells > 0)
    folders = [write_instances(tmp_path / name, {"a": one}) for name, one in (("lab", cells), ("classes", classes))]
    made = recombine_classes(*folders, tmp_path / "out", "--density", 0.2, "--image-size", 128, *words)
    shares = []
    for instances, found in made:
        assert set(np.unique(found)) <= {0, 1, 300}
        inside = np.setdiff1d(np.unique(instances), [0, *touches_border(instances)])
        shares += [np.mean(found[instances == number] == 300) for number in inside]
    assert np.mean(shares) == pytest.approx(np.mean(classes[cells > 0] == 300), rel=0.1)


def test_touching_cells_of_other_classes_keep_one_class_each(tmp_path):
    """Resizing smooths the border between two cells. Pixels that change their cell change their class, too."""
    cells = disks((60, 60), [(30, 30, 16)])
    rows, columns = np.indices(cells.shape)
    cells = np.where(rows + 2 * columns > 90, 2, 1) * (cells > 0)
    folders = [write_instances(tmp_path / name, {"a": one}) for name, one in (("lab", cells), ("classes", 5 * cells))]
    made = recombine_classes(*folders, tmp_path / "out", "--image-size", 200, "--scale", 0.7, 1.5)
    seen = [set(np.unique(found[cells == one])) for cells, found in made for one in range(1, cells.max() + 1)]
    assert len(seen) > 20 and all(len(classes) == 1 for classes in seen)


def test_pixels_of_class_0_inside_a_cell_stay(lab, class_maps, tmp_path):
    for path in class_maps.iterdir():
        values = read_png(path).copy()
        Image.fromarray(np.where(values == 7, 0, values)).save(path)
    for cells, classes in recombine_classes(lab, class_maps, tmp_path / "out"):
        assert set(np.unique(classes)) <= {0, 200}
        assert 0.25 < np.mean(classes[cells > 0] == 200) < 0.75


@pytest.mark.parametrize("word", ["", "_label"])
def test_class_maps_pair_as_masks_do_and_a_missing_one_is_made_again(lab, class_maps, tmp_path, word):
    for folder, end in ((class_maps, "_mask"), (lab, word)):
        for path in list(folder.iterdir()):
            path.rename(path.with_stem(f"{path.stem}{end}"))
    recombine_classes(lab, class_maps, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "classes" / "mix_000002.png").unlink()
    recombine_classes(lab, class_maps, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def spoiled(path: Path, fault: str) -> None:
    values = read_png(path).copy()
    if fault == "size":
        values = values[:20, :30]
    elif fault == "half":
        values = values + np.float32(0.5)
    elif fault == "gray":
        values = np.random.default_rng(0).integers(0, 256, values.shape, dtype=np.uint8)
    elif fault == "background":
        values = np.where(values == 0, 3, values)
    elif fault == "empty":
        values = 0 * values
    path.unlink()
    if fault != "missing":
        tifffile.imwrite(path.with_suffix(".tif"), values)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "3 of 3 label files in .*lab have no class map in .*classes: a, b, c"),
        ("size", "3 of 3 class maps do not fit: .*a.tif has 30 x 20 pixels, but its label file 100 x 80"),
        ("half", "a.tif does not hold whole numbers from 0 to 65535"),
        ("gray", "a.tif holds 256 values, so these are gray values, not classes"),
        ("background", "a.tif: most pixels outside of cells are not 0, but background must be 0"),
        ("empty", "the class maps in .*classes are 0 in all cells"),
    ],
)
def test_class_maps_that_do_not_fit_are_named(lab, class_maps, tmp_path, fault, words):
    for path in list(class_maps.iterdir()):
        spoiled(path, fault)
    if fault == "missing":
        Image.new("L", (100, 80)).save(class_maps / "other.png")
    with pytest.raises(InputError, match=words):
        recombine_classes(lab, class_maps, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_class_maps_that_are_the_instances_need_connected_parts(class_maps, tmp_path):
    with pytest.raises(InputError, match="--classes and --instances are one folder: add --components"):
        recombine_classes(class_maps, class_maps, tmp_path / "out")


def test_single_cells_are_drawn_as_often_as_they_are_there(tmp_path):
    """The border cuts none of them, so large ones have not been missed."""
    sources = {f"small_{n}": disks((60, 60), [(30, 30, 8)]) for n in range(4)}
    sources |= {f"large_{n}": disks((60, 60), [(30, 30, 24)]) for n in range(4)}
    folder = write_instances(tmp_path / "files", sources)
    run("recombine", "--instances", folder, "--count", 60, "--scale", 1, 1, "--single", "--output", tmp_path / "out")
    areas = [np.count_nonzero(read_png(path)) for path in (tmp_path / "out" / "instances").iterdir()]
    assert 18 <= sum(area > 1000 for area in areas) <= 42


@pytest.mark.parametrize("side", [64, 56, 44])
def test_a_single_cell_lies_whole_in_the_middle_if_it_fits(tmp_path, side):
    large = disks((60, 60), [(29.5, 29.5, 24)])
    source = write_instances(tmp_path / "large", {"a": large})
    words = ["recombine", "--instances", source, "--count", 12, "--image-size", side, "--scale", 1, 1, "--single"]
    run(*words, "--output", tmp_path / "out")
    made = [read_png(path) for path in (tmp_path / "out" / "instances").iterdir()]
    middles = np.array([ndimage.center_of_mass(cells) for cells in made])
    assert {cells.max() for cells in made} == {1}
    assert np.abs(middles - (side - 1) / 2).max() <= 0.05 * side + 1
    if side > 50:
        areas = [np.count_nonzero(cells) for cells in made]
        assert areas == pytest.approx([np.count_nonzero(large)] * 12, rel=0.03)
        assert not any(len(touches_border(cells)) for cells in made)
    assert side < 64 or len(np.unique(middles.round(1))) > 4


def test_a_single_cell_that_grows_is_not_cut_by_the_border(tmp_path):
    """It fits at its own size, and at most of the sizes that are asked for."""
    source = write_instances(tmp_path / "large", {"a": disks((64, 64), [(31.5, 31.5, 29)])})
    words = ["recombine", "--instances", source, "--count", 30, "--image-size", 64, "--scale", 0.87, 1.15, "--single"]
    run(*words, "--output", tmp_path / "out")
    made = [read_png(path) for path in (tmp_path / "out" / "instances").iterdir()]
    assert len(made) == 30 and not any(len(touches_border(cells)) for cells in made)


def test_a_single_cell_without_a_pixel_in_the_image_is_refused(tmp_path):
    ring = disks((200, 200), [(99.5, 99.5, 80)]) - disks((200, 200), [(99.5, 99.5, 70)])
    source = write_instances(tmp_path / "rings", {"a": ring})
    words = ["recombine", "--instances", source, "--count", 1, "--image-size", 64, "--scale", 1, 1, "--single"]
    with pytest.raises(InputError, match="no cell has a pixel in the middle of the image: give a smaller scale"):
        call(make_masks, *words, "--output", tmp_path / "out")


def test_cells_of_files_of_any_size_are_resized_as_training_does(tmp_path):
    cells = disks((32, 32), [(16, 16, 6)])
    sizes = {"a": cells, "b": np.kron(cells, np.ones((4, 4), int)), "c": np.pad(cells, ((0, 0), (9, 9)))}
    source, classes = (write_instances(tmp_path / name, sizes) for name in ("files", "classes"))
    words = ["recombine", "--instances", source, "--classes", classes, "--count", 9, "--crop", "center", "--single"]
    run(*words, "--image-size", 32, "--scale", 1, 1, "--rotate", "none", "--output", tmp_path / "out")
    for kind in ("instances", "classes"):
        areas = {np.count_nonzero(read_png(path)) for path in (tmp_path / "out" / kind).iterdir()}
        assert areas == {np.count_nonzero(cells)}
    for size in ([], ["--image-size", 32, 48]):
        with pytest.raises(InputError, match="--crop center: needs --image-size SIDE"):
            call(make_masks, *words, *size, "--output", tmp_path / "other")


@pytest.mark.parametrize("more", [["--density", 0.3], ["--density-scale", 2], ["--max-overlap", 0.1]])
def test_flags_of_crowds_are_refused_for_single_cells(lab, tmp_path, more):
    with pytest.raises(InputError, match=f"{more[0]} {more[1]:g}.*has no effect with --single"):
        call(make_masks, "recombine", "--instances", lab, "--output", tmp_path / "out", "--single", *more)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_free_turns_keep_the_ids_and_scale_the_area(factor):
    labels = disks((48, 60), [(22, 20, 14), (24, 45, 12)])
    piece = placing.Piece(labels, np.zeros(labels.shape, np.float32))
    settings = layout_settings(rotate="free", scale_low=factor, scale_high=factor)
    for seed in range(5):
        turned = recombine.turn_and_scale(piece, np.random.default_rng(seed), settings).labels
        expected = np.bincount(labels.ravel())[1:] * factor**2
        assert np.bincount(turned.ravel())[1:] == pytest.approx(expected, rel=0.06)


def test_recombining_is_reproducible_and_writes_its_statistics_beside_the_sources(lab, tmp_path):
    run("recombine", "--instances", lab, "--output", tmp_path / "x", "--count", 2)
    run("recombine", "--instances", lab, "--output", tmp_path / "x", "--count", 4)
    run("recombine", "--instances", lab, "--output", tmp_path / "y", "--count", 4)
    assert len(files_of(tmp_path / "x")) == 8
    assert files_of(tmp_path / "x") == files_of(tmp_path / "y")
    assert read_png(tmp_path / "x" / "instances" / "mix_000003.png").shape == (80, 100)
    with (tmp_path / "x" / "source_statistics.csv").open(newline="") as file:
        assert [(row["name"], row["cells"]) for row in csv.DictReader(file)] == [("a", "4"), ("b", "3"), ("c", "2")]
    with (tmp_path / "x" / "summary.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["measure", "made", "source"]


def test_changed_source_labels_are_another_set(lab, tmp_path):
    run("recombine", "--instances", lab, "--output", tmp_path / "x", "--count", 1)
    Image.fromarray(disks((80, 100), [(40, 40, 9)]).astype(np.uint16)).save(lab / "a.png")
    with pytest.raises(InputError, match="source_sha256"):
        run("recombine", "--instances", lab, "--output", tmp_path / "x", "--count", 1)


def test_a_source_image_without_cells_gives_an_empty_layout_at_times(tmp_path):
    maps = {"empty": np.zeros((60, 60), np.int32), "full": disks((60, 60), [(20, 20, 8), (40, 40, 8)])}
    sources = [recombine.cut_pieces(item, True) for item in maps.values()]
    counts = [recombine.Layouts(sources, layout_settings()).maps(index)[0].max() for index in range(10)]
    assert min(counts) == 0
    assert max(counts) > 0


def test_binary_masks_are_refused_and_taken_apart_on_request(tmp_path):
    binary = {name: 255 * (disks((60, 60), [(15, 15, 6), (40, 40, 8)]) > 0) for name in "ab"}
    folder = write_instances(tmp_path / "binary", binary)
    with pytest.raises(InputError, match="a single value for all cells"):
        recombine.read_sources(folder, components=False)
    with pytest.raises(InputError, match="a single value for all cells.*--components"):
        run("recombine", "--instances", folder, "--output", tmp_path / "out")
    assert all(item.max() == 2 for item in recombine.read_sources(folder, components=True).values())


def test_every_unusable_source_file_is_named(lab, tmp_path):
    (lab / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(lab / "soft.tif")
    with pytest.raises(InputError, match="2 of 5 files.*broken.*soft"):
        run("recombine", "--instances", lab, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="needs the DSB2018 nuclei beside the checkout")
def test_layouts_of_real_nuclei_have_the_statistics_of_the_source(tmp_path):
    files = sorted(NUCLEI.glob("fluo_*.png"))[::12]
    maps = {path.stem: read_png(path) for path in files}
    sources = [recombine.cut_pieces(item.astype(np.int32), True) for item in maps.values()]
    settings = layout_settings(height=256, width=192, rotate="free", scale_low=0.9, scale_high=1.1)
    layouts = recombine.Layouts(sources, settings)
    made = statistics.summarize(statistics.measure(layouts.maps(index)[0]) for index in range(60))
    source = statistics.summarize(statistics.measure(item) for item in maps.values())
    for measure, tolerance in {
        "foreground share, mean": 0.3,
        "cell diameter in pixels, mean": 0.25,
        "elongation, mean": 0.1,
    }.items():
        assert made[measure] == pytest.approx(source[measure], rel=tolerance), measure


# --- folders and flags ---


def test_a_set_made_with_other_settings_is_never_mixed_or_overwritten(tmp_path):
    simulate(tmp_path / "set", "--count", 2)
    before = files_of(tmp_path / "set")
    with pytest.raises(InputError, match="seed 0 -> 7"):
        simulate(tmp_path / "set", "--count", 2, "--seed", 7)
    assert files_of(tmp_path / "set") == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(InputError, match="this command did not make it"):
        simulate(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        simulate(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_settings_are_refused_in_words(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(InputError, match="settings.json is not readable JSON .*name another folder"):
        simulate(tmp_path)


def test_a_shorter_repeat_keeps_every_image_and_its_statistics(tmp_path):
    simulate(tmp_path / "set", "--count", 3)
    before = files_of(tmp_path / "set")
    simulate(tmp_path / "set", "--count", 1)
    assert files_of(tmp_path / "set") == before
    with (tmp_path / "set" / "statistics.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["sim_000000", "sim_000001", "sim_000002"]


def test_a_set_from_which_a_cell_was_deleted_by_hand_is_continued(tmp_path):
    simulate(tmp_path / "set", "--count", 2)
    for name in ("sim_000000.png", "sim_000001.png"):
        path = tmp_path / "set" / "instances" / name
        labels = read_png(path)
        Image.fromarray(np.where(labels == 2, 0, labels)).save(path)
    simulate(tmp_path / "set", "--count", 1)  # one image of this run, one of the longer run before
    with (tmp_path / "set" / "statistics.csv").open(newline="") as file:
        counts = [int(row["cells"]) for row in csv.DictReader(file)]
    assert counts == [len(np.unique(read_png(path))) - 1 for path in sorted((tmp_path / "set" / "instances").iterdir())]


def test_settings_are_kept_with_the_set(tmp_path):
    simulate(tmp_path / "set", "--count", 1, "--no-touching")
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert (settings["height"], settings["width"], settings["touching"]) == (48, 64, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "--image-size", "8"], "--image-size 8"),
        (["simulate", "--image-size", "64", "64", "64"], "--image-size 64 64 64"),
        (["simulate", "--density", "0.6", "--no-touching"], "--density 0.6.*0.7 with --touching"),
        (["simulate", "--cell-size", "300"], "--cell-size 300"),
        (["simulate", "--elongation", "0.5", "--cell-size", "1"], "--cell-size 1.0.*--elongation 0.5"),
        (["recombine", "--instances", "x", "--scale", "2", "1"], "--scale 2.0 1.0"),
        (["recombine", "--instances", "x", "--gap", "2", "--max-overlap", "0.2"], "--max-overlap 0.2.*--gap 2"),
        (["recombine", "--instances", "x", "--density", "0.2", "--density-scale", "2"], "--density-scale 2.0"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        run(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "--count", "0"], "--count: 0 is not a whole number"),
        (["simulate", "--seed", "-1"], "--seed: -1 is not a whole number"),
        (["simulate", "--density", "nan"], "--density: nan is not a number above 0"),
        (["simulate", "--size-spread", "1.5"], "--size-spread: 1.5 is not between 0 and 1"),
        (["simulate", "--cell-size", "inf"], "--cell-size: inf is not a number above 0"),
        (["recombine", "--instances", "x", "--gap", "-1"], "--gap: -1 is not a whole number"),
    ],
)
def test_a_value_that_is_not_a_number_in_range_ends_with_one_line(tmp_path, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--output", tmp_path / "out")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (tmp_path / "out").exists()


def test_cells_that_shrink_to_nothing_are_said(tmp_path):
    tiny = np.zeros((64, 64), np.uint16)
    tiny[10:14, 10:14], tiny[30:34, 30:34] = 1, 2
    words = ["recombine", "--instances", write_instances(tmp_path / "lab", {"a": tiny}), "--scale", 0.1, 0.1]
    code, lines = run_here(make_masks, *words, "--count", 1, "--output", tmp_path / "out")
    assert code == 2 and "the cells have fewer than 6 pixels: give a larger --scale" in lines[-1]


def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "make_masks.py", "recombine", "--instances", str(tmp_path / "none"), "--output"]
    done = subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none" in done.stderr


def test_a_set_that_another_process_makes_is_left_alone(tmp_path):
    simulate(tmp_path / "set", "--count", 1)
    before = files_of(tmp_path / "set")
    code = f"""if True:
        import sys
        from pathlib import Path
        from common.disk import lock_folder
        lock = lock_folder(Path({str(tmp_path / "set")!r}), "wait")
        print("held", flush=True)
        sys.stdin.read()"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        words = ["simulate", "--output", tmp_path / "set", "--image-size", 48, 64, "--cell-size", 10, "--count", 2]
        code, lines = run_here(make_masks, *words)
        assert code == 2
        assert "another process works in this folder. Wait for it, or name another --output" in lines[-1]
        holder.stdin.close()
    assert files_of(tmp_path / "set") == before
    simulate(tmp_path / "set", "--count", 2)
    assert len(files_of(tmp_path / "set")) == 4


def test_two_starts_at_once_leave_one_whole_set(tmp_path):
    simulate(tmp_path / "once", "--count", 4, "--render")
    words = ["make_masks.py", "simulate", "--output", tmp_path / "twice", "--count", 4, "--render"]
    command = [sys.executable, *map(str, [*words, "--image-size", 48, 64, "--cell-size", 10])]
    starts = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(start.communicate()[1], start.returncode) for start in starts]
    assert 0 in [code for _, code in ends]
    for said, code in ends:
        assert (code == 0 and said == "") or (code == 2 and "another process works" in said and said.count("\n") == 1)
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")
    assert not list((tmp_path / "twice").rglob("*.tmp"))


def test_both_kinds_of_set_note_the_version_of_their_generator(lab, tmp_path):
    simulate(tmp_path / "a", "--count", 1)
    run("recombine", "--instances", lab, "--output", tmp_path / "b", "--count", 1)
    made_with = [json.loads((tmp_path / name / "settings.json").read_text())["generator"] for name in "ab"]
    assert made_with == [1, 2]


@pytest.mark.parametrize("flag", ["--densit", "--count-all"])
def test_shortened_and_misspelt_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        make_masks.parse_args(["simulate", "--output", "x", flag, "0.2"])
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


def test_every_command_says_in_a_file_how_far_it_is(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(common.log, "LINE_SECONDS", 0.0)
    group, masks, outline = tmp_path / "images" / "g", tmp_path / "masks" / "g", [[2, 2], [12, 2], [12, 12], [2, 2]]
    for folder in (group, masks, tmp_path / "notes"):
        folder.mkdir(parents=True)
    for name in "ab":
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(group / f"{name}.tif")
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(masks / f"{name}.png")
        polygon = {"type": "Polygon", "coordinates": [outline]}
        (tmp_path / "notes" / f"{name}.geojson").write_text(json.dumps(polygon))
    commands = {
        "masks: 2 of 2 images": ["simulate", "--count", 2, "--image-size", 48, "--cell-size", 10],
        "reading instances: 3 of 3 files": ["recombine", "--instances", lab, "--count", 2],
        "converting: 2 of 2 images": ["convert", tmp_path / "notes", "--images", group],
        "flattening: 2 of 2 files": ["images", group],
        "gathering: 4 of 4 files": ["groups", "--data-path", group.parent, "--mask-path", masks.parent],
    }
    for line, words in commands.items():
        code, lines = run_here(make_masks, *words, "--output", tmp_path / "out" / words[0])
        assert code == 0 and any(line in one for one in lines), lines


def test_the_largest_density_in_the_help_is_the_largest_that_is_taken(lab, tmp_path, capsys):
    for command, flags in (("simulate", []), ("simulate", ["--no-touching"]), ("recombine", ["--instances", lab])):
        with pytest.raises(SystemExit):
            make_masks.parse_args([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        first, *rest = re.findall(
            r"[\d.]+", re.search(r"image that cells cover, above 0, at most (.*?) \(?default", text)[1]
        )
        limit = float(rest[0] if "--no-touching" in flags else first)
        for density, good in ((limit, True), (limit + 0.01, False)):
            words = [command, "--output", tmp_path / "out", *flags, "--density", density]
            args = make_masks.parse_args([str(word) for word in words])
            with contextlib.nullcontext() if good else pytest.raises(InputError, match="--density"):
                make_masks.check_args(args)


@pytest.mark.parametrize("command", [[], ["simulate"], ["recombine"]])
def test_help_shows_the_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        make_masks.parse_args([*command, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_noise_in_place_of_cells_is_refused_before_it_is_cut_into_millions_of_pieces(tmp_path):
    (tmp_path / "noise").mkdir()
    tifffile.imwrite(tmp_path / "noise" / "a.tif", np.arange(1000 * 1000, dtype=np.int32).reshape(1000, 1000))
    with pytest.raises(InputError, match=r"a\.tif: 999999 cells in 1000000 pixels cannot be cells"):
        recombine.read_sources(tmp_path / "noise", components=False)


@pytest.mark.parametrize("components", [True, False])
@pytest.mark.parametrize("labels", [np.full((9, 8), 2**63, np.uint64), np.full((9, 8), 1e20, np.float32)])
def test_ids_beyond_64_bits_are_refused_by_name(tmp_path, labels, components):
    (tmp_path / "labels").mkdir()
    labels[0] = 0
    np.save(tmp_path / "labels" / "a.npy", labels)
    with pytest.raises(InputError, match=r"a\.npy: not a single layer of whole numbers from 0 and below 2\^63"):
        recombine.read_sources(tmp_path / "labels", components)


def grid(size: int = 48, step: int = 8) -> np.ndarray:
    """Numbered squares that touch each other."""
    rows, columns = np.indices((size, size)) // step
    return (1 + rows * (size // step) + columns).astype(np.uint16)


@pytest.mark.parametrize(
    ("labels", "suffix", "words"),
    [
        (np.where(sum(np.indices((48, 48)) // 8) % 3, 0, 1 + grid() % 2), "tif", "do not number cells"),
        (np.random.default_rng(0).integers(0, 255, (48, 48)), "tif", "do not number cells"),
        (np.where(np.pad(grid(32) % 3 == 0, 8), np.pad(grid(32), 8), 200), "tif", "background must be 0"),
        (np.where(np.pad(grid(32) % 3 == 0, 8), np.pad(grid(32), 8), 0), "jpg", "are JPEG"),
    ],
)
def test_sources_that_do_not_number_cells_are_refused(tmp_path, labels, suffix, words):
    folder = tmp_path / "labels"
    folder.mkdir()
    Image.fromarray(labels.astype(np.uint8)).save(folder / f"a.{suffix}")
    code, lines = run_here(make_masks, "recombine", "--instances", folder, "--output", tmp_path / "out", "--count", 1)
    assert code == 2 and words in lines[-1] and not (tmp_path / "out").exists()


def test_touching_squares_are_labels_of_cells(tmp_path):
    (tmp_path / "labels").mkdir()
    Image.fromarray(grid()).save(tmp_path / "labels" / "a.png")
    recombine.check_sources(tmp_path / "labels", recombine.read_sources(tmp_path / "labels", components=False))
