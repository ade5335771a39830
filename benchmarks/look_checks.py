"""Two checks of looks: what they cost in sampling, and whether they tell how many cells an image holds.

    python benchmarks/look_checks.py cost
    python benchmarks/look_checks.py probe --data-path IMAGES --mask-path MASKS

cost times network calls, with weights off their start, in turn without looks, with one look for all images, with a few
looks, and with a look for each image; at the times of a solver of one call per step (ab2, euler) and of heun, whose
calls come in pairs of one time. probe predicts the number and the cover of the cells in a crop by ridge
regression from looks. Results go to standard output; benchmarks/looks.md records them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import table
from benchmarks.workloads import draw_masks, move_off_start
from common.arguments import positive_int
from common.cells import connected_cells
from common.errors import CommandParser, run_command
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.looks import look_count, measure_tensor
from dataset.masks import to_prob_map
from models import SiT, SiT_models, patch_size

FOLDS = 5
RIDGE = 1.0  # penalty, on standardised numbers
TIMES = {"ab2": (0.2, 0.3, 0.4, 0.5), "heun": (0.2, 0.2, 0.3, 0.3)}  # of successive network calls


def time_calls(args: argparse.Namespace) -> list[str]:
    """Table: median milliseconds of a network call, and the ratio to the call without looks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels, batch = args.in_channels, args.batch_size
    model = SiT_models[args.model](
        input_size=args.image_size, in_channels=channels, num_classes=2, mask_pixels=patch_size(args.model),
        patch_overlap=True, look_numbers=look_count(channels),
    ).eval()  # fmt: skip
    move_off_start(model)
    masks = to_prob_map(torch.from_numpy(draw_masks(batch, args.image_size)), 2)
    looks = torch.randn(batch, look_count(channels))
    cases = {"without looks": None, "one look for all images": looks[:1].expand_as(looks)}
    cases |= {"four looks": looks[torch.arange(batch) % 4], "a look for each": looks}
    x = torch.randn(batch, channels, args.image_size, args.image_size)
    seconds: dict[tuple[str, str], list[float]] = {(solver, name): [] for solver in TIMES for name in cases}
    with torch.inference_mode():
        conditions = {name: model.embed_mask(masks, share_rows=True, look=look) for name, look in cases.items()}
        for turn in range(args.rounds + 1):
            order = list(seconds) if turn % 2 else list(seconds)[::-1]
            for solver, name in order:
                seconds[solver, name].append(_seconds(model, x, TIMES[solver], conditions[name]))
    cells = []
    for (solver, name), found in seconds.items():
        base = seconds[solver, "without looks"]
        ratios = sorted(one / other for one, other in zip(found[1:], base[1:], strict=True))  # the first warms up
        rows = conditions[name].embedding.shape[:-1].numel()
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        cells.append([solver, name, rows, f"{1000 * statistics.median(found[1:]):.1f}", spread])
    title = f"{args.model}, {args.image_size} px, {channels} channels, {batch} images, {args.rounds} rounds"
    columns = ["solver", "looks", "rows of modulation", "ms per call", "ratio, median (lowest to highest)"]
    return [title, "", *table(columns, cells)]


def _seconds(model: SiT, x: torch.Tensor, times: Sequence[float], condition: object) -> float:
    """Processor time of a call: other programs on the machine lengthen the time on the clock."""
    begin = time.process_time()
    for one in times:
        model(x, torch.full((len(x),), one), condition)
    return (time.process_time() - begin) / len(times)


def probe(args: argparse.Namespace) -> list[str]:
    """Table: R2 over held-out images of a ridge regression from looks to the cells of a crop."""
    config = DataConfig(args.image_size, 2, "random", window=tuple(args.window), channels=args.in_channels)
    folder = PairedFolder(args.data_path, args.mask_path, config)
    names = ("the crop itself", "another crop (as in training)", "the whole image", "another image")
    looks: dict[str, list[np.ndarray]] = {name: [] for name in names}
    cells, images = [], []
    for index in range(len(folder)):
        whole = folder.look_windows(index).mean(axis=0)
        for draw in range(index * args.crops, (index + 1) * args.crops):
            example = folder[index, draw]
            mask = example["mask"].numpy() > 0
            cells.append((connected_cells(mask).max(), mask.mean()))
            images.append(index)
            other = folder.look_draw((index + 1 + draw) % len(folder), draw)
            own = measure_tensor(example["image"].numpy(), config)
            for name, look in zip(names, (own, folder.look_draw(index, draw), whole, other), strict=True):
                looks[name].append(look)
    truth, groups = np.array(cells, float), np.array(images)
    rows = [
        [name, *(f"{explained(np.stack(found), column, groups):.3f}" for column in truth.T)]
        for name, found in looks.items()
    ]
    title = f"{len(folder)} images, {args.crops} crops of each, {args.image_size} px"
    return [title, "", *table(["look of", "R2 of the number of cells", "R2 of their cover"], rows)]


def explained(inputs: np.ndarray, truth: np.ndarray, images: np.ndarray) -> float:
    """R2 of ridge regression in cross-validation over images; 0 or less: the inputs say nothing.

    Args:
        inputs: (n, N).
        truth: (n,).
        images: (n,) which image each row is from; rows of one image are in one fold.
    """
    guess = np.empty(len(truth))
    fold = np.random.default_rng(0).permutation(images.max() + 1)[images] % FOLDS
    for number in range(FOLDS):
        train = fold != number
        mean, spread = inputs[train].mean(axis=0), inputs[train].std(axis=0) + 1e-6
        scaled = (inputs - mean) / spread
        gram = scaled[train].T @ scaled[train] + RIDGE * np.eye(inputs.shape[1])
        weights = np.linalg.solve(gram, scaled[train].T @ (truth[train] - truth[train].mean()))
        guess[~train] = scaled[~train] @ weights + truth[train].mean()
    return float(1 - np.mean((truth - guess) ** 2) / truth.var())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    cost, count = parts.add_parser("cost"), parts.add_parser("probe")
    cost.set_defaults(check=time_calls)
    count.set_defaults(check=probe)
    for one in (cost, count):
        one.add_argument("--image-size", type=positive_int, default=64, help="of the model (64)")
        one.add_argument("--in-channels", type=positive_int, default=1, help="of the images (1)")
    cost.add_argument("--model", choices=list(SiT_models), default="SiT-Ti/8", metavar="NAME", help="(SiT-Ti/8)")
    cost.add_argument("--batch-size", type=positive_int, default=32, help="images of a call (32)")
    cost.add_argument("--rounds", type=positive_int, default=15, help="of all cases (15)")
    count.add_argument("--data-path", type=Path, required=True, metavar="IMAGES", help="images")
    count.add_argument("--mask-path", type=Path, required=True, metavar="MASKS", help="their masks, two classes")
    count.add_argument(
        "--window", type=float, nargs=2, default=(0.0, 99.8), metavar=("LOW", "HIGH"), help="percentiles"
    )
    count.add_argument("--crops", type=positive_int, default=4, help="of every image (4)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    print("\n".join(args.check(args)))


if __name__ == "__main__":
    run_command(main, parse_args)
