"""Which flag has an effect only together with which other flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import InputError, as_flag
from dataset.look_choice import NOBODY
from dataset.looks import NO_LOOK
from engine.autoencoder import PIXEL_SPACE
from transport import ODE_METHODS


@dataclass(frozen=True)
class Need:
    """Flags that have an effect only together with certain values of other flags.

    Attributes:
        flags: names of the flags.
        other: name of the flag that they need, or names.
        works: whether the flags have an effect with this value of the other flag, or these values.
        reason: completes "--flag has no effect ...".
        idle: values that request nothing, so that they are never refused.
        command: the subcommand that this is true of, or "" for all commands that have these flags.
    """

    flags: tuple[str, ...]
    other: str | tuple[str, ...]
    works: Callable[..., bool]
    reason: str
    idle: tuple[Any, ...] = ()
    command: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        return (self.other,) if isinstance(self.other, str) else self.other


def is_adaptive(method: str) -> bool:
    return method in ODE_METHODS and ODE_METHODS[method].adaptive


JUDGE_FLAGS = ("max_attempts", "judge_images", "judge_masks", "judge_mask_type", "judge_steps", "judge_cache")
READING_FLAGS = ("image_size", "in_channels", "crop", "window", "num_classes")  # of evaluate.py utility
LOOK_FLAGS = ("look", "look_path", "look_index", "look_group", "balance_groups", "look_table")
NEEDS = (
    Need(("tile_scale", "tile_overlap"), "tile", bool, "without --tile: add --tile"),
    Need(("most_draws",), "most_rounds", bool, "without further rounds: give --most-rounds, too"),
    Need(
        ("guidance_interval",), ("cfg_scale", "look_scale"), lambda scale, look: scale != 1 or look != 1,
        "with --cfg-scale 1 and --look-scale 1: give one of them another value", idle=((0.0, 1.0), [0.0, 1.0]),
    ),
    Need(
        ("guidance_intervals",), "cfg_scales", lambda scales: any(scale != 1 for scale in scales),
        "with --cfg-scales 1: give another scale, too", idle=([(0.0, 1.0)],),
    ),
    Need(
        ("time_shifts",), "solvers", lambda names: not all(name.startswith("sde-") for name in names),
        "with SDE solvers, whose steps are equal: leave it out",
    ),
    Need(
        ("num_sampling_steps", "time_shift"), "sampling_method", lambda method: not is_adaptive(method),
        "with {value}, an adaptive solver: leave it out",
    ),
    Need(("atol", "rtol"), "sampling_method", is_adaptive, "with {value}, a fixed-step solver: leave it out"),
    Need(("last_step_size",), "last_step", lambda name: name != "None", "with --last-step None: leave it out"),
    Need(("num_samples", "tile"), "on_real", lambda on: not on, "with --likelihood or --reverse: leave it out"),
    Need(("time_shift",), "likelihood", lambda on: not on, "with --likelihood, whose steps are equal: leave it out"),
    Need(("seed",), "reverse", lambda on: not on, "with --reverse, which draws no noise: leave it out"),
    Need(("data_path",), "reads_images", bool, "without --likelihood, --reverse or --look same: leave it out"),
    Need(LOOK_FLAGS, "on_real", lambda on: not on, "with --likelihood or --reverse: each image has its own look"),
    Need(("look_scale",), "look", lambda name: name != NOBODY, "with --look none: leave it out", idle=(1.0,)),
    Need(
        ("balance_groups",), "look_index", lambda index: index is None,
        "with --look-index, which chooses one look: leave it out",
    ),
    Need(("look",), "look_path", lambda path: path is None, "with --look-path, which says whose looks: leave it out"),
    Need(
        ("look", "look_index", "look_group", "balance_groups"), "look_table", lambda path: path is None,
        "with --look-table, which names a look for each mask: leave it out",
    ),
    Need(
        ("time_mean", "time_std"), "time_sampling", lambda name: name != "uniform",
        "with uniform times: give --time-sampling logit-normal",
    ),
    Need(("window_channels",), "in_channels", lambda channels: channels != 1, "with --in-channels 1: leave it out"),
    Need(
        ("cfg_scale",), "mask_dropout", lambda share: share > 0,
        "on the previews with --mask-dropout 0: leave it out, or give --mask-dropout above 0", idle=(1.0,),
    ),
    Need(("look_dropout",), "look", lambda name: name != NO_LOOK, "with --look none: leave it out"),
    Need(
        ("unlabelled_share", "unlabelled_mask_path"), "unlabelled_path", bool,
        "without --unlabelled-path: give it, too",
    ),
    Need(("group_column", "balance_groups"), "groups", bool, "without --groups: give it, too"),
    Need(("latent_cache",), "vae", lambda vae: vae != PIXEL_SPACE, "with --vae none: there are no latents"),
    Need(
        ("latent_cache",), "crop", lambda crop: crop == "center",
        "with --crop random, because every step uses new crops: give --crop center",
    ),
    Need(JUDGE_FLAGS, "min_fidelity", lambda least: least is not None, "without --min-fidelity: leave it out"),
    Need(JUDGE_FLAGS[2:], "judge_images", bool, "without --judge-images: give it, too"),
    Need(("mask_type", "mask_values"), "mask_path", bool, "without --mask-path: give it, too, or leave it out"),
    Need(
        ("steps", "cache_dir", "mask_path", "mask_type", "mask_values"), "inception_weights", lambda path: path is None,
        "with --inception-weights, which needs no judge: leave it out",
    ),
    Need(
        ("pseudo_share", "unlabelled_images", "no_pseudo_masks"), "unlabelled_path", bool,
        "without --unlabelled-path: give it, too", idle=(0.0,),
    ),
    Need(
        ("groups", "group_column", "whole_groups", "test_groups", "selections"), "labels", bool,
        "on shares of the labels: give --labels, too, or leave it out", idle=(0,), command="split",
    ),
    Need(("shares",), "labels", lambda labels: not labels, "with --labels: leave it out", command="split"),
    Need(("whole_groups", "test_groups"), "groups", bool, "without --groups: give it, too", idle=(0,)),
    Need(("test_share",), "test_groups", lambda count: not count, "with --test-groups: leave it out"),
    Need(
        ("test_share", "test_groups"), "test_data_path", lambda path: path is None,
        "with --test-data-path, which names the test images: leave it out", idle=(0,),
    ),
    Need(("test_instances",), "test_data_path", bool, "without --test-data-path: give it, too"),
    Need(READING_FLAGS, "sets", lambda path: path is None, "with --sets, which say how images are read: leave it out"),
    Need(
        READING_FLAGS, "synthetic", lambda sets: not sets,
        "with --synthetic, whose sets say how images are read: leave it out",
    ),
    Need(("ckpt",), "synthetic", bool, "without --synthetic: give it, too"),
    Need(("source_window",), "intensity", lambda name: name == "source", "with --intensity display: leave it out"),
)  # fmt: skip


def check_needs(args: argparse.Namespace) -> None:
    """Refuse flags of the command line that have no effect.

    Raises:
        InputError: names the flag and what it needs.
    """
    values = vars(args)
    for need in NEEDS:
        of_this = need.command in ("", values.get("command")) and set(need.others) <= set(values)
        if not of_this or need.works(*(values[name] for name in need.others)):
            continue
        for flag in need.flags:
            if flag in args.given and values.get(flag) not in need.idle:
                reason = need.reason.format(value=values[need.others[0]])
                raise InputError(f"{as_flag(flag)} has no effect {reason}.")
