"""Several random selections of a few labelled images, each with its test images, as folders.

SPLIT/selection_00/test/images, masks            real pairs that nothing is trained on
SPLIT/selection_00/labels_005/images, masks      five labelled pairs; labels_010 holds these and five more
SPLIT/selection_00/labels_005/unlabelled         images of the other training pairs, without masks
SPLIT/selection_00/split.json                    names and hashes, as of a split by shares
SPLIT/selections.json                            the numbers of labels and of selections
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.disk import check_folder, link_or_copy, new_folder, write_json
from common.errors import InputError, list_some
from common.plain import read_as
from common.randomness import derived_seed, shuffled_by_hash
from dataset.files import Pair, mark_nuclei
from dataset.groups import groups_of
from evaluation.experiments.split import (
    SplitPlan,
    copy_files,
    copy_pairs,
    hashes_of,
    instances_of,
    plan_shares,
    read_pairs,
    read_split,
)
from evaluation.image_facts import group_near_duplicates

SELECTIONS_FILE = "selections.json"
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class SelectionSettings:
    """How labelled images are chosen.

    Attributes:
        labels: numbers of labelled images, or of labelled groups with ``whole_groups``.
        selections: random selections.
        seed: of all of them.
        test_share: of the pairs, tested on in every selection; not used with test folders or ``test_groups``.
        whole_groups: a label is a whole group, such as a patient.
        test_groups: number of groups that only the tests of a selection use; 0 tests on ``test_share`` of the pairs.
    """

    labels: Sequence[int]
    selections: int = 5
    seed: int = 0
    test_share: float = 0.2
    whole_groups: bool = False
    test_groups: int = 0


def choose(groups: Mapping[str, str], settings: SelectionSettings, selection: int) -> tuple[list[str], dict]:
    """Names of one selection.

    Images are taken from the groups in turn, the largest group first, so that every look gets labels. Smaller numbers
    of labels are part of the larger ones.

    Args:
        groups: name -> group of the pairs that may be chosen.

    Returns:
        (test names: those of ``test_groups``, number of labels -> labelled names).

    Raises:
        InputError: too few images or groups.
    """
    seed = derived_seed(settings.seed, selection)
    members: dict[str, list[str]] = {}
    for name in shuffled_by_hash(groups, seed):
        members.setdefault(groups[name], []).append(name)
    drawn = shuffled_by_hash(members, seed)
    test = [name for group in drawn[: settings.test_groups] for name in members[group]]
    drawn = drawn[settings.test_groups :]
    if settings.whole_groups:
        units = [sorted(members[group]) for group in drawn]
    else:
        ordered = sorted(drawn, key=lambda group: -len(members[group]))
        longest = max((len(members[group]) for group in drawn), default=0)
        units = [[members[group][turn]] for turn in range(longest) for group in ordered if turn < len(members[group])]
    if max(settings.labels) > len(units):
        what = "groups" if settings.whole_groups else "images"
        raise InputError(
            f"{max(settings.labels)} labels are asked for, and {len(units)} {what} are left to choose from"
        )
    return sorted(test), {count: sorted(sum(units[:count], [])) for count in sorted(set(settings.labels))}


def make_selections(
    output: Path,
    folders: tuple[str | Path, str | Path],
    settings: SelectionSettings,
    test_folders: tuple[str | Path, str | Path] | None = None,
    instance_dir: str | Path | None = None,
    test_instance_dir: str | Path | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[SplitPlan]:
    """Write the folders of all selections, or none; files are links to one copy if the disk can do that.

    Args:
        folders: of images and of masks.
        test_folders: images and masks to test on; None takes some of the pairs.
        instance_dir: instance labels of the pairs, copied along.
        test_instance_dir: instance labels of the test pairs.
        groups: name -> group; None puts all into one.

    Raises:
        InputError: the folder holds something, too few pairs, test images among the training images, or images that
            have no group.
    """
    check_folder(output)
    pairs, tested = read_pairs(folders, test_folders)
    everything = pairs | tested
    of_group = dict.fromkeys(everything, "")
    if groups is not None:
        names = [pair.name for pair in everything.values()]
        of_group = dict(zip(everything, groups_of(names, groups), strict=True))
    _refuse_one_name(everything)
    chosen = _choose_all(pairs, tested, of_group, settings)
    hashes = hashes_of(everything)
    cells = instances_of(pairs, folders[0], instance_dir)
    if test_folders and test_instance_dir:
        own = instances_of({pair.name: pair for pair in tested.values()}, test_folders[0], test_instance_dir)
        cells |= {f"test/{name}": path for name, path in own.items()}
    plans: list[SplitPlan] = []
    for number, (test, by_labels) in enumerate(chosen):
        rest = sorted(set(pairs) - set(test))
        plan = SplitPlan(
            output / f"selection_{number:02d}", settings.seed, test, by_labels, *hashes, "labels",
            {count: sorted(set(rest) - set(names)) for count, names in by_labels.items()}, of_group,
        )  # fmt: skip
        plans.append(plan)
    with new_folder(output) as folder:
        for plan in plans:
            _write(replace(plan, folder=folder / plan.folder.name), everything, cells, folder / "pool")
        write_json(folder / SELECTIONS_FILE, asdict(settings) | {"labels": sorted(set(settings.labels))})
    return plans


def _choose_all(
    pairs: Mapping[str, Pair], tested: Mapping[str, Pair], groups: Mapping[str, str], settings: SelectionSettings
) -> list[tuple[list[str], dict[int, list[str]]]]:
    """Test names and labelled names of every selection."""
    test = sorted(tested)
    if not tested and not settings.test_groups:
        test, _ = plan_shares(group_near_duplicates(list(pairs.values())), settings.test_share, [100], settings.seed)
    free = {name: groups[name] for name in pairs if name not in test}
    found = [choose(free, settings, number) for number in range(settings.selections)]
    if settings.test_groups:
        _refuse_shown_in_both(list(pairs.values()), [own for own, _ in found], groups)
    return [(own or test, by_labels) for own, by_labels in found]


def _refuse_shown_in_both(pairs: Sequence[Pair], tests: Sequence[Sequence[str]], groups: Mapping[str, str]) -> None:
    """Raise InputError if test groups of a selection show nearly the same as the other groups."""
    alike = group_near_duplicates(pairs)
    for number, test in enumerate(tests):
        own = set(test)
        both = sorted(name for names in alike if not own.issuperset(names) for name in own.intersection(names))
        if both:
            other = sorted({groups[name] for names in alike if own.intersection(names) for name in names})
            raise InputError(
                f"selection {number}: {len(both)} images of the `test_groups` show nearly the same as images of other "
                f"groups, that is a leak: {list_some(both)}. Give images that show the same one group, of "
                f"{list_some(other)}"
            )


def _write(plan: SplitPlan, pairs: Mapping[str, Pair], cells: Mapping[str, Path], pool: Path) -> None:
    """The folders of one selection; ``pool`` holds the one copy that the others link to."""
    if not pool.is_dir():
        copy_pairs([replace(pair, name=_flat(name)) for name, pair in pairs.items()], pool, {})
        for name, path in cells.items():
            (pool / "instances").mkdir(exist_ok=True)
            copy_files(path, pool / "instances" / f"{_flat(name)}{'' if path.is_dir() else path.suffix}")
    parts = {plan.part(None): plan.test} | {plan.part(count): names for count, names in plan.shares.items()}
    for folder, names in parts.items():
        _link(pool, folder, [_flat(name) for name in names], ("images", "masks", "instances"))
        mark_nuclei(folder)
    for count, names in plan.unlabelled.items():
        _link(pool, plan.part(count) / UNLABELLED, [_flat(name) for name in names], ("images",))
    plan.write()


def _flat(name: str) -> str:
    """The name of a file of a test pair, which may be that of a training pair, too."""
    return name.replace("/", "__")


def _refuse_one_name(names: Iterable[str]) -> None:
    """Raise InputError if files of a training and of a test pair would get one name."""
    by_file: dict[str, str] = {}
    for name in names:
        other = by_file.setdefault(_flat(name), name)
        if other != name:
            raise InputError(f"{other} and {name} would get one file name: rename the training image {other}")


def _link(pool: Path, folder: Path, names: Iterable[str], kinds: Sequence[str]) -> None:
    """Hard links of a part's files; copies if the disk has no links."""
    wanted = set(names)
    for kind in kinds:
        files = list((pool / kind).iterdir()) if (pool / kind).is_dir() else []
        files = [path for path in files if (path.name if path.is_dir() else path.stem) in wanted]
        if files:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for path in files:
            link_or_copy(path, folder / kind / path.name)


def read_selections(folder: str | Path) -> list[SplitPlan]:
    """The plans of a folder that :func:`make_selections` wrote, each checked against its files.

    Raises:
        InputError: it is none, or files were changed since.
    """
    path = Path(folder) / SELECTIONS_FILE
    count = read_as(path, lambda content: range(content["selections"]), "make the folder with evaluate.py split")
    known: dict[tuple[int, ...], str] = {}  # selections share files
    return [read_split(Path(folder) / f"selection_{number:02d}", known) for number in count]


def holds_selections(folder: str | Path) -> bool:
    """Whether a folder was split by numbers of labels."""
    return (Path(folder) / SELECTIONS_FILE).is_file()
