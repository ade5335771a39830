"""Tables, sentences and the plot of the utility experiment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from common.disk import write_csv, write_json
from evaluation.experiments.arms import ALL_ARMS, LONGER, LONGER_FACTOR, REAL, WITHOUT_SYNTHETIC
from evaluation.experiments.split import words_of
from evaluation.experiments.trial import TRIAL_VERSION, TrialRow
from evaluation.instances import mean_of_known
from evaluation.output import Section, Table, mean_and_spread, new_figure, number, save_figure, with_spread

CONFIDENCE = 0.95  # of the intervals
AHEAD, BEHIND = 2.0, 1.0  # standard errors: a gain beyond the first helps, a loss beyond the second harms
SCORES = ("ap50", "ap75", "ap90", "ap50_touching", "pq", "dice")
TITLES = {
    "ap50": "AP 0.5", "ap75": "AP 0.75", "ap90": "AP 0.9", "ap50_touching": "AP 0.5, touching", "pq": "PQ",
    "dice": "Dice",
}  # fmt: skip
HELPS, HARMS, UNCLEAR, UNKNOWN = "helps", "harms", "no clear difference", "one selection: not known"


@dataclass(frozen=True)
class Difference:
    """A paired difference over selections.

    Attributes:
        mean: of the differences, selection by selection.
        error: standard error of that mean; None for one selection.
        low, high: interval of ``CONFIDENCE`` by Student's t; None for one selection.
        count: selections.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def verdict(self) -> str:
        """What the difference says. A warning comes earlier than a recommendation: see ``AHEAD`` and ``BEHIND``."""
        if self.error is None:
            return UNKNOWN
        if self.mean > AHEAD * self.error:
            return HELPS
        return HARMS if self.mean < -BEHIND * self.error else UNCLEAR


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Mean of first - second over the selections that both have; None if there is none."""
    both = sorted(set(first) & set(second))
    if not both:
        return None
    gains = np.array([first[key] - second[key] for key in both])
    if len(gains) < 2:
        return Difference(float(gains.mean()), None, None, None, len(gains))
    error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(gains) - 1)) * error
    mean = float(gains.mean())
    return Difference(mean, error, mean - reach, mean + reach, len(gains))


def by_selection(
    rows: Sequence[TrialRow], labels: int, arm: str, score: str = "ap50", group: str | None = None
) -> dict[int, float]:
    """Selection -> score of an arm, mean over its seeds; of one group of test images, or of all."""
    values: dict[int, list[float]] = {}
    for row in rows:
        scores = row.score if group is None else row.groups.get(group)
        value = None if scores is None else getattr(scores, score)
        if (row.labels, row.arm) == (labels, arm) and value is not None:
            values.setdefault(row.selection, []).append(value)
    return {selection: float(np.mean(found)) for selection, found in sorted(values.items())}


def labels_worth(curve: Mapping[int, float], value: float) -> tuple[float, str]:
    """Number of labels at which real images alone reach a score, read off the real curve on a logarithmic axis.

    ``curve`` maps two or more numbers of labels to the score of real images alone.

    Returns:
        The number and its words; outside of the curve its end, "fewer than" or "more than".
    """
    numbers = sorted(curve)
    reached = np.maximum.accumulate([curve[count] for count in numbers])  # more labels are worth no less
    if value < reached[0]:
        return float(numbers[0]), f"fewer than {numbers[0]}"
    if value > reached[-1]:
        return float(numbers[-1]), f"more than {numbers[-1]}"
    worth = float(np.exp(np.interp(value, reached, np.log(numbers))))
    return worth, f"{worth:.0f}"


# --- the summary -----------------------------------------------------------------------------------------------------


def summarize_trial(rows: Sequence[TrialRow], steps: int, unit: str = "labels") -> dict:
    """All that tables, plot and recommendation need, as plain types.

    With the unit "percent" the spread is over the seeds, since there is only one selection. Such a spread says nothing
    of other labels, so there is no verdict.
    """
    by_labels = unit == "labels"
    if not by_labels:
        rows = [replace(row, selection=row.seed) for row in rows]
    counts = sorted({row.labels for row in rows})
    known = {labels: by_selection(rows, labels, REAL) for labels in counts}
    arms = {
        labels: sorted({row.arm for row in rows if row.labels == labels}, key=list(ALL_ARMS).index) for labels in counts
    }
    entries = [_entry(rows, labels, arm, known) for labels in counts for arm in arms[labels]]
    if not by_labels:
        for entry in entries:
            entry["gain"] = entry["gain"] and entry["gain"] | {"verdict": None}
    comparisons = [_best_against_best(rows, labels, arms[labels]) for labels in counts if by_labels]
    return {
        "version": TRIAL_VERSION,
        "kind": unit,
        "steps": steps,
        "summary": entries,
        "comparisons": [found for found in comparisons if found is not None],
        "groups": _group_table(rows),
    }


def _entry(rows: Sequence[TrialRow], labels: int, arm: str, known: Mapping[int, Mapping[int, float]]) -> dict:
    """What the tables say of an arm at a number of labels.

    Args:
        known: number of labels -> selection -> score of real images alone.
    """
    real = known[labels]
    own = [row for row in rows if (row.labels, row.arm) == (labels, arm)]
    entry: dict = {"labels": labels, "arm": arm, "trainings": len(own), "selections": len({r.selection for r in own})}
    for score in SCORES:
        entry[score], entry[f"{score}_std"] = mean_and_spread(list(by_selection(rows, labels, arm, score).values()))
    classes = [row.score.class_dice for row in own]
    entry["class_dice"] = [mean_of_known([one[k] for one in classes]) for k in range(len(classes[0]))]
    gain = difference(by_selection(rows, labels, arm), real) if arm != REAL else None
    entry["gain"] = None if gain is None else asdict(gain) | {"verdict": gain.verdict}
    scores = by_selection(rows, labels, arm)
    entry["gains"] = {str(key): scores[key] - real[key] for key in sorted(set(scores) & set(real))}
    entry["worth"] = None if arm in WITHOUT_SYNTHETIC else _worth(scores, labels, known)
    entry["images"] = (
        f"{own[0].real_images} + {round(np.mean([row.synthetic_images + row.pseudo_images for row in own]))}"
    )
    return entry


def _worth(scores: Mapping[int, float], labels: int, known: Mapping[int, Mapping[int, float]]) -> str | None:
    """Labels that real images alone need for the scores of an arm, in the same selections; None if not known."""
    shared = set(scores) & set(known[labels])
    curve = {count: _mean_over(shared, real) for count, real in known.items() if shared and shared <= set(real)}
    return labels_worth(curve, _mean_over(shared, scores))[1] if len(curve) > 1 else None


def _mean_over(selections: Iterable[int], scores: Mapping[int, float]) -> float:
    return float(np.mean([scores[selection] for selection in sorted(selections)]))


def _best_against_best(rows: Sequence[TrialRow], labels: int, arms: Sequence[str]) -> dict | None:
    """The best arm with synthetic images against the best without, in the same selections.

    These are the most selections that two such arms share. Arms that lack some of them are left out.
    """
    scores = {arm: by_selection(rows, labels, arm) for arm in arms}
    made, others = ([arm for arm in arms if (arm in WITHOUT_SYNTHETIC) == alone] for alone in (False, True))
    shared = max((set(scores[one]) & set(scores[other]) for one in made for other in others), key=len, default=set())
    if not shared:
        return None
    complete = [arm for arm in arms if shared <= set(scores[arm])]
    best, other = (
        max((arm for arm in part if arm in complete), key=lambda arm: _mean_over(shared, scores[arm]))
        for part in (made, others)
    )

    def gain(group: str | None = None) -> dict | None:
        pair = (by_selection(rows, labels, arm, group=group) for arm in (best, other))
        found = difference(*({key: value for key, value in one.items() if key in shared} for one in pair))
        return None if found is None else asdict(found) | {"verdict": found.verdict}

    groups = {name: found for name in _group_names(rows) if (found := gain(name)) is not None}
    left_out = [arm for arm in arms if scores[arm] and arm not in complete]
    named = {"labels": labels, "synthetic": best, "other": other, "groups": groups, "left_out": left_out}
    return named | (gain() or {})


def _group_names(rows: Sequence[TrialRow]) -> list[str]:
    """Groups of the test images; none if there is only one."""
    names = sorted({name for row in rows for name in row.groups})
    return names if len(names) > 1 else []


def _group_table(rows: Sequence[TrialRow]) -> list[dict]:
    """Mean AP at 0.5 of every group of test images, by labels and arm."""
    names = _group_names(rows)
    found = []
    for labels, arm in dict.fromkeys((row.labels, row.arm) for row in rows if names):
        own = [row for row in rows if (row.labels, row.arm) == (labels, arm)]
        scores = {name: mean_of_known([row.groups[name].ap50 for row in own if name in row.groups]) for name in names}
        found.append({"labels": labels, "arm": arm, "ap50": scores})
    return found


# --- as people read it -----------------------------------------------------------------------------------------------


def trial_table(content: dict) -> Table:
    """One row per number of labels and arm."""
    rows = []
    for one in content["summary"]:
        gain = one["gain"]
        shown = None
        if gain is not None:
            shown = number(gain["mean"], 3, "+")
            if gain["low"] is not None:
                shown += f" [{number(gain['low'], 2, '+')}, {number(gain['high'], 2, '+')}]"
        scores = [with_spread(one[score], one[f"{score}_std"]) for score in SCORES]
        verdict = None if gain is None else gain["verdict"]
        words = words_of(one["labels"], content["kind"])
        rows.append([f"{words}, {one['arm']}", *scores, shown, verdict, one["worth"], one["images"]])
    worth = "worth in labels" if content["kind"] == "labels" else "worth in % of the labels"
    columns = ["trained on", *TITLES.values(), "gain in AP 0.5", "verdict", worth, "real + other images"]
    return Table(columns, rows)


def trial_notes(content: dict) -> list[str]:
    """Sentences below the table: what is best, what to do, and scores by class and group."""
    longer = [one for one in content["summary"] if one["arm"] == LONGER]
    exception = f" ({LONGER}: {LONGER_FACTOR} times as many)" if longer else ""
    lines = [NOTE[content["kind"]], f"{content['steps']} steps in every arm{exception}, the same augmentation."]
    for one in content["comparisons"]:
        shown = with_spread(one["mean"], one["error"], "+")
        error = "" if one["error"] is None else " (standard error)"
        lines.append(
            f"{one['labels']} labels: the best arm with synthetic images ({one['synthetic']}) minus the best without "
            f"({one['other']}): {shown}{error} in AP 0.5 over {one['count']} selections: {one['verdict']}. "
            f"{advice(one)}"
        )
        if one.get("left_out"):
            missing = "; ".join(one["left_out"])
            lines.append(f"{one['labels']} labels: not compared, because selections are missing: {missing}.")
        gains = [f"{name} {with_spread(gain['mean'], gain['error'], '+')}" for name, gain in one["groups"].items()]
        lines += [f"{one['labels']} labels, the same difference by group: {', '.join(gains)}"] if gains else []
    lines += [longer_note(one) for one in longer if one["gain"] is not None]
    for one in content["summary"]:
        if one["gain"] is not None and one["gain"]["verdict"] == HARMS and one["arm"] != LONGER:
            lines.append(f"{one['labels']} labels: {one['arm']} is harmful: it is behind real images alone.")
    for one in content["summary"]:
        if len(one["class_dice"]) > 1:
            dices = ", ".join(f"class {k} {number(value)}" for k, value in enumerate(one["class_dice"], start=1))
            lines.append(f"{words_of(one['labels'], content['kind'])}, {one['arm']}: Dice of {dices}")
    for one in content["groups"]:
        scores = ", ".join(f"{name or 'no group'} {number(value)}" for name, value in one["ap50"].items())
        lines.append(f"AP 0.5 by group, {one['labels']} labels, {one['arm']}: {scores}")
    return lines


def longer_note(entry: dict) -> str:
    """What more steps give real images alone, and whether the other gains can be believed."""
    mean, error = entry["gain"]["mean"], entry["gain"]["error"]
    shown = with_spread(mean, error, "+")
    text = f"{entry['labels']} labels: {LONGER_FACTOR} times the steps change the AP of real images alone by {shown}."
    if mean <= (error or 0):
        return text
    return f"{text} The segmenters are not trained out, so another gain may only be faster learning: give more steps."


def advice(comparison: dict) -> str:
    """What a lab should do: use synthetic images only if they are clearly ahead of the best other arm."""
    if comparison["verdict"] == HELPS:
        return f"Use synthetic images: {comparison['synthetic']}."
    if comparison["verdict"] == HARMS:
        return f"Do not use synthetic images here: {comparison['other']} is better."
    return f"Do not use synthetic images here: they are not clearly better than {comparison['other']}."


WORTH = "Worth in labels: how many labels real images alone need for the same AP, read off their curve."
NOTE = {
    "labels": (
        "Mean ± standard deviation over the random selections of labels. The gain is AP at IoU 0.5 over that of real "
        f"images alone, selection by selection, with its {CONFIDENCE:.0%} interval. It helps if it exceeds {AHEAD:g} "
        f"standard errors. It harms if it is below -{BEHIND:g} standard error. {WORTH} The best of several arms looks "
        "a little better than it is."
    ),
    "percent": (
        "Mean ± standard deviation over the seeds. The gain is AP at IoU 0.5 over that of real images alone at the "
        f"same share of the labels, seed by seed, with its {CONFIDENCE:.0%} interval. All seeds have the same labels, "
        f"so this says nothing of other labels: for a verdict, split by numbers of labels. {WORTH}"
    ),
}
SECTION = Section(
    "utility",
    "Does it help: a segmenter trained on it, tested on real images",
    "Tested on real images that nothing was trained on.",
    trial_table,
    trial_notes,
    ("utility.png",),
)


def write_trial(rows: Sequence[TrialRow], steps: int, output: Path, unit: str = "labels") -> tuple[dict, list[Path]]:
    """Write ``utility.json``, ``utility.csv`` (a row per training) and ``utility.png``; the content and the files."""
    content = summarize_trial(rows, steps, unit)
    write_json(output / "utility.json", content)
    names = [one.name for one in dataclasses.fields(TrialRow) if one.name not in ("score", "groups")]
    titles = ["share" if name == "labels" and unit == "percent" else name for name in names]
    table = [[getattr(row, name) for name in names] + [getattr(row.score, s) for s in SCORES] for row in rows]
    write_csv(output / "utility.csv", [*titles, *SCORES], table)
    draw_trial(content, output / "utility.png")
    return content, [output / name for name in ("utility.json", "utility.csv", "utility.png")]


def draw_trial(content: dict, path: Path) -> None:
    """AP at 0.5 against the number of labels, a line per arm, bars of one standard deviation over selections."""
    figure = new_figure(9, 5)
    axis = figure.subplots()
    arms = list(dict.fromkeys(one["arm"] for one in content["summary"]))
    counts = sorted({one["labels"] for one in content["summary"]})
    for place, arm in enumerate(arms):
        own = [one for one in content["summary"] if one["arm"] == arm and one["ap50"] is not None]
        shift = 1 + 0.012 * (place - len(arms) / 2)
        axis.errorbar(
            [one["labels"] * shift for one in own],
            [one["ap50"] for one in own],
            [one["ap50_std"] or 0 for one in own],
            label=arm,
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="--" if arm in WITHOUT_SYNTHETIC else "-",
            color="black" if arm == REAL else f"C{place % 10}",
        )
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("labelled images" if content["kind"] == "labels" else "share of the labels, %")
    axis.set_ylabel("AP at IoU 0.5")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)
