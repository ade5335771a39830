"""evaluate.py realism: exact Frechet distances, real-against-real spread, Inception weights only from a file."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_sets import Row, disk, paint, place, write_set
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from evaluation import realism
from evaluation.judge import CHANNELS, Judge, build_network, deepest_layer
from evaluation.realism import (
    JUDGE_DISTANCE,
    SECTION,
    compare_with_splits,
    extract_all,
    frechet_distance,
    inception_features,
    kernel_inception_distance,
    real_components,
    real_crops,
    score_realism,
    write_realism_report,
)
from synthetic.reader import SampleSet

SIZE = 24
CPU = torch.device("cpu")


def gaussian(count: int, dims: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dims)) @ np.diag(np.linspace(0.5, 2, dims))


def gray_image(level: int, seed: int) -> np.ndarray:
    """A noisy image of a mean gray value and a disk somewhere, uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    cells = disk(SIZE, *place(rng, 6, SIZE - 6), 5)
    return np.clip(paint(cells, level + 60, level) + rng.normal(0, 6, (SIZE, SIZE, 1)), 0, 255).astype(np.uint8)


@pytest.fixture
def real(tmp_path) -> Path:
    """Twenty-four real pairs."""
    for kind in ("images", "masks"):
        (tmp_path / "real" / kind).mkdir(parents=True)
    for seed in range(24):
        Image.fromarray(gray_image(60, seed)).save(tmp_path / "real" / "images" / f"r{seed:02d}.png")
        Image.fromarray(np.where(disk(SIZE, 10, 12, 5), 255, 0).astype(np.uint8)).save(
            tmp_path / "real" / "masks" / f"r{seed:02d}.png"
        )
    return tmp_path / "real"


def gray_set(folder: Path, level: int, count: int = 12) -> SampleSet:
    label = np.where(disk(SIZE, 10, 12, 5), 255, 0).astype(np.uint8)
    return SampleSet(write_set(folder, [Row(label, gray_image(level, 500 + seed)) for seed in range(count)]))


def mean_and_spread(images) -> np.ndarray:
    """Features of known meaning: mean gray value and standard deviation."""
    return np.array([[image.mean(), image.std()] for image in images])


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [9, 60], ids=["fewer images than features", "more images"])
def test_shift_gives_its_squared_length_and_scale_its_closed_form(count):
    features = gaussian(count, 20, seed=0)
    shift = np.linspace(-1, 1, 20)
    trace = np.trace(np.cov(features, rowvar=False))
    centred = features - features.mean(axis=0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + shift) == pytest.approx((shift**2).sum())
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * trace)


@pytest.mark.parametrize("count", [9, 60])
def test_frechet_distance_is_that_of_torch_fidelity(count):
    first, second = gaussian(count, 20, seed=1), gaussian(count + 4, 20, seed=2) + 0.3
    statistics = [fid_features_to_statistics(torch.from_numpy(one)) for one in (first, second)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_kid_of_equal_distributions_is_zero_within_its_spread_and_grows_with_the_shift():
    same = [kernel_inception_distance(gaussian(80, 8, seed), gaussian(80, 8, 100 + seed)) for seed in range(10)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(10) + 1e-6 and min(same) < 0
    assert kernel_inception_distance(gaussian(80, 8, 0), gaussian(80, 8, 1) + 1) > 10 * max(same)


def test_same_distribution_lies_within_real_against_real_and_a_shifted_one_above():
    real, groups = gaussian(120, 6, 0), np.arange(120)
    same = compare_with_splits("d", frechet_distance, gaussian(90, 6, 1), real, groups)
    shifted = compare_with_splits("d", frechet_distance, gaussian(90, 6, 1) + 1, real, groups)
    assert len(same.synthetic) == len(same.real) == 20 and same.images_compared == 60
    assert np.mean(same.synthetic) == pytest.approx(np.mean(same.real), rel=0.4)
    assert min(shifted.synthetic) > max(shifted.real) and np.mean(shifted.synthetic) == pytest.approx(6, rel=0.3)
    assert same.real == shifted.real


def test_windows_of_one_image_never_meet_each_other():
    """Windows of an image are equal here and images far apart: a pair of windows would be at distance 0."""
    images = np.arange(8)[:, None] * np.ones(2) * 100
    groups = np.repeat(np.arange(8), 4)
    met = []

    def record(first, second):
        met.append((set(first[:, 0]), set(second[:, 0])))
        return 0.0

    found = compare_with_splits("d", record, gaussian(40, 2, 1), images[groups], groups, splits=5)
    assert found.images_compared == 4
    for ours, theirs in met[1:-1:2]:  # real against real; the last call compares all images
        assert len(ours) == len(theirs) == 4 and not ours & theirs


def test_synthetic_images_of_a_halfs_own_masks_are_not_compared_with_it():
    """Synthetic images equal to the real ones of their masks are as far from the others as real images are."""
    real, groups = gaussian(40, 3, 0), np.arange(40)
    paired = compare_with_splits("d", frechet_distance, real, real, groups, partners=groups)
    assert sorted(paired.synthetic) == pytest.approx(sorted(paired.real))
    unpaired = compare_with_splits("d", frechet_distance, real, real, groups)
    assert np.mean(unpaired.synthetic) < 0.7 * np.mean(unpaired.real)


def test_components_are_the_directions_of_the_real_images_in_units_of_their_spread():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(200, 2)) * [3, 1]
    real = np.stack([hidden[:, 0], 1000 * hidden[:, 0], hidden[:, 1], np.zeros(200)], axis=1)  # says one thing twice
    found = real_components(real, real)
    assert found.shape == (200, 2) and np.allclose(np.cov(found, rowvar=False), np.eye(2), atol=1e-6)
    shifted = real_components(real + [3, 3000, 0, 7], real)
    assert frechet_distance(shifted, found) == pytest.approx((3 / hidden[:, 0].std()) ** 2, rel=0.05)
    assert real_components(real[:5], real[:8]).shape == (5, 2) and real_components(real[:5], real[:4]).shape == (5, 1)


def test_crops_of_one_image_do_not_count_as_images_for_the_directions(tmp_path, real, monkeypatch):
    """Four crops of each of 24 images: 6 directions, not 24."""
    config, shapes = DataConfig(image_size=SIZE - 2, crop="random"), []

    def noted(first: np.ndarray, second: np.ndarray) -> float:
        shapes.append((first.shape[1], second.shape[1]))
        return frechet_distance(first, second)

    monkeypatch.setattr(realism, "frechet_distance", noted)
    rows = [Row(np.full((SIZE - 2, SIZE - 2), 255, np.uint8), gray_image(60, seed)[:-2, :-2]) for seed in range(12)]
    samples = SampleSet(write_set(tmp_path / "set", rows, config))
    report = score_realism(
        samples, real / "images", lambda images: np.stack(images)[:, 4:9, 4:9, 0].reshape(-1, 25), "", False
    )
    assert (report.real_images, report.real_crops) == (24, 96) and set(shapes) == {(6, 6)}


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="too few"):
        compare_with_splits("d", frechet_distance, gaussian(5, 2, 0), gaussian(3, 2, 1), np.arange(3))


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_known_statistics_give_their_distance_beside_the_real_spread(tmp_path, real):
    near = score_realism(gray_set(tmp_path / "near", 60), real / "images", mean_and_spread, "known", False)
    far = score_realism(gray_set(tmp_path / "far", 100), real / "images", mean_and_spread, "known", False)
    (close,), (wide,) = near.distances, far.distances
    assert close.name == JUDGE_DISTANCE and "FID" not in "\n".join(SECTION.lines(near.to_dict()))
    assert np.mean(close.synthetic) < 2 * max(close.real)
    means = [image.mean() for image in real_crops(real / "images", DataConfig(image_size=SIZE))[1]]
    assert wide.whole > (40 / np.std(means)) ** 2 * 0.9 and min(wide.synthetic) > 50 * max(wide.real)
    assert near.real_images == 24 and close.images_compared == 12


def test_real_images_get_the_window_of_training(tmp_path):
    (tmp_path / "images").mkdir()
    dark = np.tile(np.linspace(0, 50, 30), (26, 1)).astype(np.uint8)
    Image.fromarray(dark).save(tmp_path / "images" / "a.png")
    plain = list(real_crops(tmp_path / "images", DataConfig(image_size=26, crop="random"))[1])
    stretched = list(real_crops(tmp_path / "images", DataConfig(image_size=26, window=(0, 100)))[1])
    assert len(plain) == 4 and len(stretched) == 1
    assert max(image.max() for image in plain) <= 50 and stretched[0].max() > 220


def test_masks_beside_the_real_images_are_no_real_images(real):
    images = real / "images"
    for mask in (real / "masks").iterdir():
        mask.rename(images / f"{mask.stem}_masks.png")
    paths, crops = real_crops(images, DataConfig(image_size=SIZE))
    assert len(list(crops)) == 24 and {path.stem for path in paths} == {f"r{seed:02d}" for seed in range(24)}


def test_real_images_are_never_all_in_memory(tmp_path):
    (tmp_path / "images").mkdir()
    count, config = 3 * realism.FEATURE_BATCH, DataConfig(image_size=SIZE, crop="random")
    for number in range(count):
        Image.fromarray(gray_image(60, number)).save(tmp_path / "images" / f"r{number:03d}.png")
    alive: list[weakref.ref] = []
    most = 0

    def extract(images) -> np.ndarray:
        nonlocal most
        alive.extend(weakref.ref(image) for image in images)
        most = max(most, sum(one() is not None for one in alive))
        return mean_and_spread(images)

    paths, images = real_crops(tmp_path / "images", config)
    assert len(extract_all(extract, images)) == len(paths) == 4 * count and len(alive) == 4 * count
    assert most <= 2 * realism.FEATURE_BATCH


def test_report_is_written_with_means_and_picture(tmp_path, real):
    samples = gray_set(tmp_path / "set", 60)
    report = score_realism(samples, real / "images", mean_and_spread, "known", True, splits=3)
    folder = write_realism_report(samples, report)
    content = json.loads((folder / "realism.json").read_text())
    assert [entry["name"] for entry in content["distances"]] == ["FID", "KID"]
    assert content["distances"][0]["real_mean"] == pytest.approx(np.mean(report.distances[0].real))
    assert (folder / "realism.png").stat().st_size > 1000


# --- features --------------------------------------------------------------------------------------------------------


def test_judge_features_are_the_mean_of_its_deepest_layer(monkeypatch):
    judge = Judge(build_network(2), CPU, SIZE)
    images = [gray_image(60, 1), gray_image(120, 2), gray_image(60, 1)]
    features = judge.features(images)
    assert features.shape == (3, CHANNELS[-1]) and np.allclose(features[0], features[2], atol=1e-6)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    shapes = []
    deepest_layer(judge.network).register_forward_hook(lambda layer, given, out: shapes.append(out.shape))
    judge.class_maps(images)
    assert shapes == [(3, CHANNELS[-1], SIZE // 8, SIZE // 8)]
    monkeypatch.setattr(realism, "FEATURE_BATCH", 2)
    assert np.allclose(extract_all(judge.features, images), features, atol=1e-5)


def test_missing_weights_are_not_fetched_and_the_message_says_where_they_are(tmp_path):
    with pytest.raises(InputError, match="no such file.*https://.*inception"):
        inception_features(tmp_path / "none.pth", CPU)


def test_weights_that_would_run_code_or_are_others_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("code of the file runs",))

    torch.save({"a": Harmful()}, tmp_path / "code.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("code.pth", "other.pth"):
        with pytest.raises(InputError, match="holds other weights"):
            inception_features(tmp_path / name, CPU)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """A file of random weights, with names and shapes of torch-fidelity's Inception."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    captured = {}

    def keep(self, state):  # the architecture fills itself: no published weights are needed here
        captured.update(torch.nn.Module.state_dict(self))

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", keep)
        module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(captured, path)
    return path


@pytest.mark.slow
def test_inception_from_a_file_gives_2048_features_of_every_image_by_itself(inception_weights):
    extract = inception_features(inception_weights, CPU)
    features = extract([gray_image(60, 1), gray_image(90, 2)])
    assert features.shape == (2, 2048) and np.isfinite(features).all()
    assert np.allclose(extract([gray_image(90, 2)])[0], features[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_weights_of_another_network_or_damaged_ones_are_refused(inception_weights, tmp_path):
    state = torch.load(inception_weights, weights_only=True)
    last = list(state)[-2]
    contents = {
        "wrapped": {"state_dict": state},
        "missing": {name: value for name, value in state.items() if name != last},
        "shape": state | {last: state[last][..., :5]},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "torn.pth").write_bytes(inception_weights.read_bytes()[:100_000])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    for name in (*contents, "torn", "page", "script"):
        with pytest.raises(InputError, match=f"{name}.pth holds other weights than https://"):
            inception_features(tmp_path / f"{name}.pth", CPU)


@pytest.mark.slow
def test_command_with_weights_gives_fid_and_kid_and_says_that_they_are_not_the_published_ones(
    inception_weights, tmp_path, real, capsys
):
    samples = gray_set(tmp_path / "set", 60)
    command = ["realism", str(samples.folder), "--data-path", str(real / "images"), "--splits", "3"]
    evaluate.main(evaluate.parse_args([*command, "--inception-weights", str(inception_weights)]))
    printed, logged = capsys.readouterr()
    assert "FID" in printed and "KID" in printed and JUDGE_DISTANCE not in printed
    assert "which are not the published ones" in printed and "do not compare its numbers with published FIDs" in logged
    content = json.loads((samples.folder / "evaluation" / "realism.json").read_text())
    assert np.isfinite([entry["whole"] for entry in content["distances"]]).all()


def test_command_without_weights_needs_masks_and_uses_the_judge(tmp_path, real, capsys):
    samples = gray_set(tmp_path / "set", 60)
    command = ["realism", str(samples.folder), "--data-path", str(real / "images")]
    with pytest.raises(InputError, match="--mask-path"):
        evaluate.main(evaluate.parse_args(command))
    more = ["--mask-path", str(real / "masks"), "--steps", "2", "--cache-dir", str(tmp_path / "judges")]
    evaluate.main(evaluate.parse_args(command + more))
    printed = capsys.readouterr().out
    assert JUDGE_DISTANCE in printed and "FID" not in printed and "20 random splits" in printed


def test_command_refuses_too_few_images_before_the_judge_is_trained(tmp_path, real):
    (tmp_path / "few").mkdir()
    for path in sorted((real / "images").iterdir())[:3]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    command = ["realism", str(gray_set(tmp_path / "set", 60).folder), "--data-path", str(tmp_path / "few")]
    command += ["--mask-path", str(real / "masks"), "--steps", "2", "--cache-dir", str(tmp_path / "judges")]
    with pytest.raises(InputError, match="and 3 real images are too few to compare"):
        evaluate.main(evaluate.parse_args(command))
    assert not (tmp_path / "judges").exists()
