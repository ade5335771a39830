"""Groups of images, such as patients or microscopes: from a table, or from one sub-folder for each group.

Commands read flat folders and a table. Sub-folders are brought into this form once, by :func:`gather_groups`. Commands
do not read them directly, because a folder of masks can already hold sub-folders: one for each image, with a file for
each nucleus. Which of the two is meant cannot be seen from the names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.disk import check_folder, is_litter, link_or_copy, new_folder, write_csv
from common.errors import InputError, list_some
from common.log import with_progress
from dataset.files import Pair, find_images, list_folders, mark_nuclei, pair_files
from dataset.folder_hints import list_folder, warn_of_skipped
from dataset.names import IMAGE_SUFFIXES, MASK_SUFFIXES, bare_image_name, by_bare_names, is_split, odd_names, read_names

TABLE = "groups.csv"
NO_GROUPS = {"images", "image", "masks", "mask", "labels", "instances"}  # folders that mean something else
IMAGES, MASKS, UNLABELLED = "images", "masks", "unlabelled"  # folders that gather_groups makes


def read_groups(path: Path, column: str) -> dict[str, str]:
    """Group of every name, from a table with the columns ``name`` and ``column``, see :func:`read_names`."""
    return read_names(path, "name", column)


def groups_of(names: Sequence[str], groups: Mapping[str, str]) -> list[str]:
    """Group of each image. The table may have a word for images that a pair leaves out: ``f1_img.png`` for ``f1``.

    Raises:
        InputError: an image has no group.
    """
    known = set(names)
    others = {name: group for name, group in groups.items() if name not in known}
    groups = by_bare_names(others, bare_image_name) | dict(groups)
    without = [name for name in names if not groups.get(name)]
    if without:
        raise InputError(f"`groups`: {len(without)} of {len(names)} images have no group: {list_some(without)}.")
    return [groups[name] for name in names]


def members_of(groups: Sequence[str]) -> list[list[int]]:
    """Numbers of the members of each group, groups sorted by name."""
    members: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    return [members[group] for group in sorted(members)]


def gather_groups(
    output: Path,
    image_dir: Path | None = None,
    mask_dir: Path | None = None,
    unlabelled_dir: Path | None = None,
) -> dict[str, int]:
    """Put files of sub-folders, one for each group, into flat folders, and write the table of their groups.

    ``image_dir/GROUP/NAME.png`` becomes ``output/images/GROUP_NAME.png``; so do masks in ``output/masks`` and images
    without masks in ``output/unlabelled``. ``output/groups.csv`` has the columns ``name`` and ``group``. Files are hard
    links, which need no space, or copies if the disk has no links.

    Returns:
        Number of images of each group, sorted by name.

    Raises:
        InputError: files beside the sub-folders, sub-folders that are no groups, images without masks, or two files
            that would get one name. Nothing is written then.
    """
    check_folder(output)
    pairs = _pairs_of_groups(image_dir, mask_dir) if image_dir is not None and mask_dir is not None else {}
    others = _files_of_groups(unlabelled_dir) if unlabelled_dir is not None else {}
    images = {**{key: pair.image_path for key, pair in pairs.items()}, **others}
    rows = sorted((f"{name}{path.suffix}", group) for (group, name), path in images.items())
    twice = [name for name, count in Counter(name for _, name in (*pairs, *others)).items() if count > 1]
    if twice:
        raise InputError(f"two images would get one name: {list_some(twice)}. Rename groups or images")
    files = [(IMAGES, name, pair.image_path) for (_, name), pair in pairs.items()]
    files += [(MASKS, name, pair.mask_path) for (_, name), pair in pairs.items()]
    files += [(UNLABELLED, name, path) for (_, name), path in others.items()]
    with new_folder(output) as folder:
        for kind, name, path in with_progress(files, "gathering", "file"):
            (folder / kind).mkdir(exist_ok=True)
            link_or_copy(path, folder / kind / (name if path.is_dir() else f"{name}{path.suffix}"))
        mark_nuclei(folder)
        write_csv(folder / TABLE, ("name", "group"), rows)
    return dict(sorted(Counter(group for _, group in rows).items()))


def _pairs_of_groups(image_dir: Path, mask_dir: Path) -> dict[tuple[str, str], Pair]:
    """(group, name in the flat folder) -> pair."""
    groups, others = group_folders(image_dir, "image"), group_folders(mask_dir, "mask")
    lonely = sorted(set(groups) ^ set(others))
    if lonely:
        raise InputError(f"{image_dir} and {mask_dir} have different groups: only one of them has {list_some(lonely)}")
    pairs = {}
    for group in groups:
        listings = list_folders(groups[group], others[group])
        pairs[group] = pair_files(groups[group], others[group], listings)
        warn_of_skipped(listings, [path for pair in pairs[group] for path in (pair.image_path, pair.mask_path)])
    nuclei = [group for group, found in pairs.items() if any(pair.mask_path.is_dir() for pair in found)]
    if nuclei:
        pairs = {group: _pairs_with_nuclei(found, others[group], nuclei[0]) for group, found in pairs.items()}
    return {(group, f"{group}_{pair.name}"): pair for group, found in pairs.items() for pair in found}


def _pairs_with_nuclei(pairs: Sequence[Pair], mask_dir: Path, other: str) -> list[Pair]:
    """Pairs of a group, if another group has one file per nucleus: a folder with a single file holds a nucleus, too."""
    if any(pair.mask_path.parent == mask_dir and pair.mask_path.is_file() for pair in pairs):
        raise InputError(
            f"{mask_dir} has one mask for each image, but the masks of the group {other} have one file for each "
            "nucleus: gather the groups of each kind on their own"
        )
    return [pair if pair.mask_path.is_dir() else replace(pair, mask_path=pair.mask_path.parent) for pair in pairs]


def _files_of_groups(folder: Path) -> dict[tuple[str, str], Path]:
    """(group, name in the flat folder) -> image."""
    images = {}
    for group, inner in group_folders(folder, "image").items():
        listing = list_folder(inner, "image")
        images[group] = find_images(inner, listing)
        warn_of_skipped([listing], images[group].values())
    return {(group, f"{group}_{name}"): path for group, found in images.items() for name, path in found.items()}


def group_folders(folder: Path, what: str) -> dict[str, Path]:
    """Sub-folders that stand for groups, by name. Hidden ones and those that systems leave are left out.

    Args:
        what: "image" or "mask".

    Raises:
        InputError: no such folder, no sub-folders, files beside them, or names that mean something else.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder.")
    entries = sorted(path for path in folder.iterdir() if not is_litter(path.name))
    suffixes = IMAGE_SUFFIXES if what == "image" else MASK_SUFFIXES
    files = [path.name for path in entries if path.is_file() and path.suffix.lower() in suffixes]
    folders = {path.name: path for path in entries if path.is_dir()}
    if files:
        raise InputError(
            f"{folder} holds {len(files)} {what} files that are in no group: {list_some(files)}. Move them into the "
            "sub-folder of their group"
        )
    if not folders:
        raise InputError(f"{folder} has no sub-folders, one for each group")
    unprintable = odd_names(folders)  # they end in a table, and in names of files
    if unprintable:
        raise InputError(f"{folder} {unprintable}")
    odd = [name for name in folders if name.lower() in NO_GROUPS or is_split(name)]
    if odd:
        raise InputError(f"{folder} has the sub-folders {list_some(odd)}, whose names mean no group: rename them")
    deeper = [inner.name for inner in folders.values() if what == "image" and _has_files_and_folders(inner)]
    if deeper:
        raise InputError(f"{folder}: {list_some(deeper)} holds images and folders. A group has one folder of images")
    return folders


def _has_files_and_folders(folder: Path) -> bool:
    entries = [path for path in folder.iterdir() if not is_litter(path.name)]
    return any(path.is_dir() for path in entries) and any(path.suffix.lower() in IMAGE_SUFFIXES for path in entries)
