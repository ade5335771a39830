"""Which mask belongs to which image, by their names alone, and hints if the names do not agree."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from common.disk import read_csv_lines
from common.errors import InputError, list_some

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".npy", ".npz")
# Cellpose: NAME_cp_masks beside NAME, NAME_masks beside NAME_img. Longer endings come first.
MASK_ENDINGS = ("_cp_masks", "_masks", "_mask")
IMAGE_ENDING = "_img"
# Words that labs put before or behind the name of an image, with one of " _.-" between.
_MASK_WORDS = (  # longer ones come first
    "binary[ _-]?masks?|masks?[ _-]binary|binary|label[ _-]?(?:img|image|map)s?|labell?(?:ed|ing)|lblimg|lbl|cp_masks|"
    "(?:cell|nuc|nuclei)?masks?|labels?|"
    "simple[ _-]segmentation|object[ _-](?:identities|predictions)|probabilities|"  # ilastik
    "segmentations?|segmented|segm?|annotations?|anno|ground_?truth|gt|instances?|inst(?:ance)?[ _-]?map|"
    "predictions?|pred"
)
# What masks show. Images of one stain have such names, too, so these words count only where none of the others fits.
_OBJECTS = "nuclei|nucleus|nuclear|nuc|cells?|cytoplasm|cyto|membranes?|objects?|manual|auto"
_IMAGE_WORDS = "images?|img|im|raw|original|orig"
_MASK_ENDING = re.compile(rf"[ _.-]({_MASK_WORDS})$", re.IGNORECASE)
_IMAGE_ENDING = re.compile(rf"([ _.-]({_IMAGE_WORDS})|_0000)$", re.IGNORECASE)  # nnU-Net ends images with _0000
# A word in front may also touch a number: mask007, and man_seg007 beside t007 of the Cell Tracking Challenge.
_MASK_START = re.compile(
    rf"^((count )?({_MASK_WORDS})( of )|({_MASK_WORDS})([ _.-]|(?=\d+$))|man_(seg|track)_?(?=\d+$))", re.IGNORECASE
)  # Mask of NAME and Count Masks of NAME are Fiji's
_OBJECT_ENDING = re.compile(rf"[ _.-]({_OBJECTS}|{_MASK_WORDS})$", re.IGNORECASE)
_OBJECT_START = re.compile(rf"^({_OBJECTS}|{_MASK_WORDS})[ _.-]", re.IGNORECASE)
MOST_WORDS = 3  # beside a word for masks, in names such as f1_nuclei_manual_mask
_IMAGE_START = re.compile(rf"^(({_IMAGE_WORDS})([ _.-]|(?=\d+$))|t(?=\d+$))", re.IGNORECASE)
# Some programs keep the suffix of the image in the name of the mask: f1.jpg.png, f1.ome_cp_masks.png.
_SUFFIX_INSIDE = re.compile(r"\.(png|jpe?g|tiff?|bmp|gif|jp2|nd2|czi|lif|svs|ome)$", re.IGNORECASE)
# Names of folders that hold a part of a data set.
_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|held[ _-]?out|hold[ _-]?out|dev|eval)([ _-]?(set|data|images|masks))?|"
    r"(fold|split|cv)[ _-]?\d*",
    re.IGNORECASE,
)


def is_split(name: str) -> bool:
    """Whether a folder's name says that it holds a part of a data set: ``train``, ``test_set``, ``fold1``."""
    return _SPLIT.fullmatch(name) is not None


def plain_name(stem: str) -> str:
    """A name without ``.ome`` or ``.OME``, in NFC: a Mac writes accents as letters apart."""
    return unicodedata.normalize("NFC", stem[:-4] if stem.lower().endswith(".ome") else stem)


def name_of(file_name: str) -> str:
    """Name of an image or a mask by its file, with or without suffix: ``f1.ome.tif`` -> ``f1``, ``f.1`` -> ``f.1``."""
    stem, dot, suffix = file_name.rpartition(".")
    return plain_name(stem if stem and dot + suffix.lower() in MASK_SUFFIXES else file_name)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of files for messages: each with as many parent folders as make the names differ."""
    names = [path.name for path in paths]
    for count in range(2, 1 + max((len(path.parts) for path in paths), default=0)):
        often = Counter(names)
        if len(often) == len(names):
            break
        longer = ["/".join(path.parts[-count:]) for path in paths]
        names = [other if often[name] > 1 else name for name, other in zip(names, longer, strict=True)]
    return names


def read_names(path: Path, key: str, column: str, once: bool = False) -> dict[str, str]:
    """A user's table about images or masks: name of each -> value.

    Args:
        path: CSV file. Rows without any text are left out.
        key: column of the names of files, with or without suffix.
        column: column of the values.
        once: refuse two rows of one name even if their values are equal.

    Raises:
        InputError: a column or a name is missing, or two rows of one name have different values.
    """
    columns, rows = read_csv_lines(path)
    missing = [name for name in (key, column) if name not in columns]
    if missing:
        mend = ". Commas must separate the columns" if len(columns) == 1 and re.search("[;\t]", columns[0]) else ""
        raise InputError(f"{path} has no column {missing[0]}; it has {', '.join(columns)}{mend}")
    found: dict[str, list[str]] = {}
    for number, row in rows:
        if not row[key] and any(row.values()):
            raise InputError(f"{path}: line {number} has no {key}")
        if row[key]:
            found.setdefault(name_of(row[key]), []).append(row[column])
    twice = [name for name, values in found.items() if len(values if once else set(values)) > 1]
    if twice:
        raise InputError(f"{path}: names with more than one {column}: {list_some(twice)}")
    return {name: values[0] for name, values in found.items()}


def by_bare_names(table: Mapping[str, str], bare: Callable[[str], str]) -> dict[str, str]:
    """The values of a table by names without one word. A name that would have several values is left out.

    Args:
        bare: :func:`bare_mask_name` or :func:`bare_image_name`.
    """
    found: dict[str, set[str]] = {}
    for name, value in table.items():
        found.setdefault(bare(name), set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def bare_mask_name(stem: str) -> str:
    """``f1_label``, ``f1-mask``, ``mask_f1`` and ``f1.jpg`` -> ``f1``. The stem itself if it has no such word."""
    return _SUFFIX_INSIDE.sub("", _without(stem, _MASK_ENDING, _MASK_START))


def bare_mask_names(stem: str) -> list[str]:
    """Names of images that a mask may belong to, the nearest first.

    ``f1_nuclei_mask`` -> ``f1_nuclei``, ``f1``. The first is :func:`bare_mask_name`.
    """
    names = [bare_mask_name(stem)]
    for _ in range(MOST_WORDS):
        name = _SUFFIX_INSIDE.sub("", _without(names[-1], _OBJECT_ENDING, _OBJECT_START))
        if name == names[-1]:
            break
        names.append(name)
    return names


def bare_image_name(stem: str) -> str:
    """``f1_raw``, ``image_f1`` and ``f1.tif`` -> ``f1``. The stem itself if it has no such word."""
    return _SUFFIX_INSIDE.sub("", _without(stem, _IMAGE_ENDING, _IMAGE_START))


def _without(stem: str, ending: re.Pattern[str], start: re.Pattern[str]) -> str:
    """The stem without one word: an ending if there is one, else a start."""
    for word in (ending, start):
        rest = word.sub("", stem)
        if rest and rest != stem:
            return rest
    return stem


def split_together(stems: Iterable[str]) -> tuple[set[str], set[str]]:
    """Stems of images and of masks that lie in one folder, told apart by the words in their names.

    Either set is empty if the names do not tell.
    """
    stems = set(stems)
    masks = {stem for stem in stems if stem.endswith(MASK_ENDINGS)}
    if not masks or masks == stems:
        masks = {stem for stem in stems if _without(stem, _MASK_ENDING, _MASK_START) != stem}
    if not masks:
        masks = {stem for stem in stems if stems.intersection(bare_mask_names(stem)[1:])}
    return stems - masks, masks


def without_images(masks: dict[str, Path]) -> dict[str, Path]:
    """The masks of a folder, by stem, without the images beside them: Cellpose keeps both in one folder."""
    _, mask_stems = _pairs_together(masks)
    return {stem: path for stem, path in masks.items() if stem in mask_stems} if mask_stems else masks


def without_masks(images: dict[str, Path]) -> dict[str, Path]:
    """The images of a folder, by stem, without the masks beside them: the other half of :func:`without_images`."""
    _, mask_stems = _pairs_together(images)
    return {stem: path for stem, path in images.items() if stem not in mask_stems}


def _pairs_together(stems: Iterable[str]) -> tuple[set[str], set[str]]:
    """:func:`split_together`, but no masks unless each of them has its image among the stems."""
    stems = set(stems)
    image_stems, mask_stems = split_together(stems)
    beside = image_stems | {bare_image_name(stem) for stem in image_stems}
    if all(beside.intersection(bare_mask_names(stem)) for stem in mask_stems):
        return image_stems, mask_stems
    return stems, set()


def partners(images: Iterable[str], masks: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str], list[str]]:
    """Pair stems: NAME with NAME, else with NAME and a word for masks. A word for images may be left out.

    Returns:
        name of the pair -> stems of its image and its mask; stems of images without mask; of masks without image.

    Raises:
        InputError: two images or two masks would make one pair.
    """
    masks = list(masks)
    known = set(masks)
    by_bare: list[dict[str, list[str]]] | None = None  # most folders do without
    pairs: dict[str, tuple[str, str]] = {}
    used: dict[str, str] = {}
    lonely = []
    for stem in images:
        base = stem.removesuffix(IMAGE_ENDING) or stem
        keys = (stem, base, *(start + end for start in (base, stem) for end in MASK_ENDINGS))
        key = next((key for key in keys if key in known), None)
        if key is None:
            by_bare = _by_bare_names(masks) if by_bare is None else by_bare
            key, base = _by_words(stem, by_bare)
        if key is None:
            lonely.append(stem)
            continue
        name = stem if key == stem else base
        if key in used or name in pairs:
            other = used[key] if key in used else pairs[name][0]
            raise InputError(f"images {other} and {stem} would make one pair of the name {name}: rename one")
        used[key] = stem
        pairs[name] = (stem, key)
    return pairs, lonely, [stem for stem in masks if stem not in used]


def _by_bare_names(masks: Iterable[str]) -> list[dict[str, list[str]]]:
    """Masks by the names of :func:`bare_mask_names`: those without one word, without two, and so on."""
    found: list[dict[str, list[str]]] = [{} for _ in range(MOST_WORDS + 1)]
    for stem in masks:
        for level, name in zip(found, bare_mask_names(stem), strict=False):
            level.setdefault(name, []).append(stem)
    return found


def _by_words(stem: str, by_bare: Sequence[dict[str, list[str]]]) -> tuple[str | None, str]:
    """The mask of an image whose name differs in such words only, and the name of the pair."""
    for level in by_bare:
        for name in dict.fromkeys((stem, bare_image_name(stem))):
            found = level.get(name, [])
            if len(found) > 1:
                raise InputError(f"image {stem} has {len(found)} masks: {list_some(found)}. Keep one of them")
            if found:
                return found[0], name
    return None, stem


def name_hints(images: Sequence[str], masks: Sequence[str], paired: Iterable[str] = ()) -> list[str]:
    """Why names of images and masks without a partner may not agree."""
    names = set(paired)
    second = next(((stem, name) for stem in masks for name in bare_mask_names(stem) if name in names), None)
    if second:
        return [f"{second[0]} is a second mask of the image {second[1]}: keep one mask for each image"]
    for what, stems, of, others, mend in (
        ("images", images, "mask", masks, "if they are channels of one image, save them as one TIFF"),
        ("masks", masks, "image", images, "keep one kind of mask in this folder"),
    ):
        longer = _longer(stems, names.union(others))
        start, several = max(longer.items(), key=lambda one: len(one[1]), default=("", []))
        if len(several) > 1:
            return [f"{len(several)} {what} begin with the name of the {of} {start} ({list_some(several)}): {mend}"]
    image_names, mask_names = ({stem.casefold().strip() for stem in stems} for stems in (images, masks))
    alike = sorted(image_names & mask_names)
    if alike:
        return [f"names differ in capital letters or spaces only: {list_some(alike)}"]
    image_numbers, mask_numbers = (
        [tuple(map(int, re.findall(r"\d+", stem))) for stem in one] for one in (images, masks)
    )
    if (
        () in image_numbers
        or not images
        or sorted(image_numbers) != sorted(mask_numbers)
        or len(set(image_numbers)) < len(images)
    ):
        return []
    other = masks[mask_numbers.index(image_numbers[0])]
    return [f"the numbers in the names agree ({images[0]} and {other}): rename one kind after the other"]


def _longer(stems: Iterable[str], others: set[str]) -> dict[str, list[str]]:
    """Stems by the longest other stem that they begin with, before one of " _.-"."""
    found: dict[str, list[str]] = {}
    for stem in stems:
        starts = [stem[: match.start()] for match in re.finditer("[ _.-]", stem)]
        start = next((one for one in reversed(starts) if one in others), None)
        if start is not None:
            found.setdefault(start, []).append(stem)
    return found


def odd_names(names: Iterable[str]) -> str:
    """A sentence about names that cannot be printed. Empty if there are none."""
    odd = [ascii(name) for name in names if not name.isprintable()]
    if not odd:
        return ""
    encoding = sys.getfilesystemencoding()
    mend = "Rename them" if encoding == "utf-8" else f"This shell reads names as {encoding}: set LC_ALL=C.UTF-8"
    return f"has names with characters that cannot be printed: {list_some(odd)}. {mend}"
