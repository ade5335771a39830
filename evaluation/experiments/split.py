"""Test images and nested shares of the training images, as folders: where the utility experiment begins.

SPLIT/test/images, masks          real pairs that nothing is trained on
SPLIT/share_010/images, masks     10 % of the others; share_020 holds these and more, and so on
SPLIT/split.json                  names and hashes: what ``evaluate.py utility`` checks leaks with
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.disk import check_folder, file_sha256, new_folder, write_json
from common.errors import InputError, list_some
from common.plain import read_json
from common.randomness import shuffled_by_hash
from dataset.checks import check_same_size
from dataset.files import Pair, find_files, labels_of_images, mark_nuclei, pair_files, read_image, read_size
from evaluation.image_facts import Shown, group_near_duplicates, shown_among

SPLIT_FILE = "split.json"
DEFAULT_SHARES = (10, 20, 50, 100)


@dataclass(frozen=True)
class SplitPlan:
    """Who is tested on and who is trained on at each share.

    Attributes:
        folder: SPLIT.
        seed: of the order.
        test: names of the test pairs.
        shares: percent of the training pairs, or number of labels, -> names, each share holding the smaller ones.
        images: name -> sha256 of the image file.
        masks: name -> sha256 of the mask file (or folder of nuclei).
        unit: what the keys of ``shares`` count, "percent" or "labels".
        unlabelled: number of labels -> names of the other training pairs, whose masks nothing may see.
        groups: name -> look, patient or what else the images are grouped by.
    """

    folder: Path
    seed: int
    test: list[str]
    shares: dict[int, list[str]]
    images: dict[str, str] = field(repr=False)
    masks: dict[str, str] = field(repr=False)
    unit: str = "percent"
    unlabelled: dict[int, list[str]] = field(default_factory=dict, repr=False)
    groups: dict[str, str] = field(default_factory=dict, repr=False)

    def part(self, share: int | None) -> Path:
        """Folder of a share, of the test images for None."""
        name = "share" if self.unit == "percent" else "labels"
        return self.folder / ("test" if share is None else f"{name}_{share:03d}")

    def words(self, share: int) -> str:
        """A share as a message says it."""
        return words_of(share, self.unit)

    def write(self) -> None:
        """Write ``split.json``."""
        write_json(self.folder / SPLIT_FILE, {name: value for name, value in asdict(self).items() if name != "folder"})


def words_of(share: int, unit: str) -> str:
    """A share or a number of labels in words."""
    return f"{share} % of the labels" if unit == "percent" else f"{share} labels"


def plan_shares(groups: Sequence[Sequence[str]], test_share: float, shares: Sequence[int], seed: int) -> tuple:
    """Names of test and shares; a group of near-duplicates is never divided between test and training.

    Args:
        groups: names that belong together.
        test_share: of all names, 0 for none.
        shares: percent of the training names.
        seed: of the order, which follows from a hash of seed and name and not from the folder.

    Returns:
        (test names, percent -> training names).
    """
    by_name = {min(names): names for names in groups}
    order = [by_name[name] for name in shuffled_by_hash(by_name, seed)]
    total = sum(len(names) for names in order)
    test: list[str] = []
    while order and len(test) < test_share * total - 1e-9:
        test += order.pop(0)
    rest = [name for names in order for name in names]
    return sorted(test), {share: sorted(rest[: _share_of(len(rest), share)]) for share in sorted(set(shares))}


def _share_of(count: int, percent: int) -> int:
    """A share of a number of names, rounded up, at least 1."""
    return max(1, math.ceil(count * percent / 100 - 1e-9))


def shown_in_both(pairs: Iterable[Pair], test_pairs: Iterable[Pair]) -> list[str]:
    """Names of test pairs whose image is (nearly) one of the others."""
    known = [Shown.of(pair.name, read_image(pair.image_path)) for pair in pairs]
    tested = [Shown.of(pair.name, read_image(pair.image_path)) for pair in test_pairs]
    return sorted(one.name for one, shown in zip(tested, shown_among(tested, known), strict=True) if shown)


def read_pairs(
    folders: tuple[str | Path, str | Path], test_folders: tuple[str | Path, str | Path] | None
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """(name -> pair, "test/NAME" -> test pair) of folders of images and masks; no test pair for None.

    Raises:
        InputError: test images among the training images.
    """
    pairs = {pair.name: pair for pair in pair_files(*folders)}
    tested = {f"test/{pair.name}": pair for pair in pair_files(*test_folders)} if test_folders else {}
    both = shown_in_both(pairs.values(), tested.values()) if test_folders else []
    if test_folders and both:
        raise InputError(
            f"{len(both)} images of {test_folders[0]} show nearly the same as images of {folders[0]}, that is a leak: "
            f"{list_some(both)}"
        )
    return pairs, tested


def make_split(
    output: Path,
    folders: tuple[str | Path, str | Path],
    shares: Sequence[int] = DEFAULT_SHARES,
    test_share: float = 0.2,
    seed: int = 0,
    test_folders: tuple[str | Path, str | Path] | None = None,
    instance_dir: str | Path | None = None,
    test_instance_dir: str | Path | None = None,
) -> SplitPlan:
    """Copy pairs into ``output``, all or none.

    Args:
        folders: of images and of masks.
        shares: percent of the training pairs, 1..100.
        test_share: share of the pairs that is tested on; not used with test folders.
        seed: of the choice.
        test_folders: images and masks to test on; None takes some of the pairs.
        instance_dir: instance labels of the pairs, copied along.
        test_instance_dir: instance labels of the test pairs.

    Raises:
        InputError: the folder holds something, too few pairs, test images among the training images.
    """
    check_folder(output)
    pairs, tested = read_pairs(folders, test_folders)
    drawn, by_share = plan_shares(
        group_near_duplicates(list(pairs.values())), 0 if tested else test_share, shares, seed
    )
    test = sorted(tested) or drawn
    if not test or not by_share[max(by_share)]:
        raise InputError(f"{folders[0]} holds {len(pairs)} pairs, too few for test images and shares")
    everything = pairs | tested
    plan = SplitPlan(output, seed, test, by_share, *hashes_of(everything))
    instances = instances_of(pairs, folders[0], instance_dir)
    of_test = instances
    if test_folders:
        by_name = {pair.name: pair for pair in tested.values()}
        of_test = instances_of(by_name, test_folders[0], test_instance_dir)
    with new_folder(output) as folder:
        growing = replace(plan, folder=folder)
        copy_pairs([everything[name] for name in test], growing.part(None), of_test)
        for share, chosen in by_share.items():
            copy_pairs([pairs[name] for name in chosen], growing.part(share), instances)
        growing.write()
    return plan


def hashes_of(pairs: Mapping[str, Pair]) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of the image and of the mask of every name."""
    images = {name: file_sha256(pair.image_path) for name, pair in pairs.items()}
    return images, {name: file_sha256(pair.mask_path) for name, pair in pairs.items()}


def instances_of(pairs: dict[str, Pair], image_dir: str | Path, instance_dir: str | Path | None) -> dict[str, Path]:
    """Name -> file of instance labels, for all pairs; none without ``instance_dir``."""
    if instance_dir is None:
        return {}
    found = labels_of_images([pair.image_path for pair in pairs.values()], image_dir, instance_dir)
    for image, cells in found.items():
        size, own = read_size(image), read_size(cells)
        if size is not None and own is not None:
            check_same_size(size, own, cells)
    return {name: found[pair.image_path] for name, pair in pairs.items()}


def copy_pairs(pairs: Iterable[Pair], folder: Path, instances: Mapping[str, Path]) -> None:
    """Copy images, masks and instance labels into the folders of a part."""
    for pair in pairs:
        files = {"images": pair.image_path, "masks": pair.mask_path, "instances": instances.get(pair.name)}
        for kind, path in files.items():
            if path is None:
                continue
            (folder / kind).mkdir(parents=True, exist_ok=True)
            copy_files(path, folder / kind / f"{pair.name}{'' if path.is_dir() else path.suffix}")
    mark_nuclei(folder)


def copy_files(source: Path, target: Path) -> None:
    """Copy a file, or the files of a folder."""
    if source.is_dir():
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            copy_files(path, target / path.name)
    else:
        shutil.copyfile(source, target)


def read_split(folder: str | Path, known: dict[tuple[int, ...], str] | None = None) -> SplitPlan:
    """The plan of a folder that :func:`make_split` made.

    Args:
        known: see ``file_sha256``.

    Raises:
        InputError: it is none, or files were changed since.
    """
    folder = Path(folder)
    path = folder / SPLIT_FILE
    content = read_json(path, "make the folder with evaluate.py split")
    try:
        shares = {int(share): names for share, names in content["shares"].items()}
        unlabelled = {int(share): names for share, names in content.get("unlabelled", {}).items()}
        plan = SplitPlan(
            folder, content["seed"], content["test"], shares, content["images"], content["masks"],
            content.get("unit", "percent"), unlabelled, content.get("groups", {}),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); make the split again") from error
    for share, names in [(None, plan.test), *plan.shares.items()]:
        for kind, hashes in (("images", plan.images), ("masks", plan.masks)):
            found = {file_sha256(file, known) for file in find_files(plan.part(share) / kind, kind[:-1]).values()}
            if found != {hashes[name] for name in names}:
                raise InputError(f"{plan.part(share) / kind} is not what {path} says; make the split again")
    return plan
