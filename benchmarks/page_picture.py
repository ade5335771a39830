"""Takes the picture docs/page.png: the page with looks, masks and a judge, in Chromium.

    python benchmarks/page_picture.py --ckpt CKPT.pt --judge-images IMAGES --judge-masks MASKS [--mask 8]

The model was trained with ``--look reference``. Without Chromium and its driver, the script ends with one line.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import CHROMIUM, DRIVER, MISSING, Browser

from common.arguments import non_negative_int, positive_int
from common.errors import CommandParser, InputError, run_command

WIDTH, MARGIN = 1440, 8  # pixels
DONE = "document.body.dataset.state === 'done' && looks !== null && document.body.dataset.state"


def take_picture(page: Browser, mask: int) -> bytes:
    """PNG of the page, down to the masks to start from, with the drawing of one of these masks."""
    page.resize(WIDTH, 1000)
    page.wait(DONE, 200)
    page.wait(f"byId('masks').children.length > {mask}")
    page.run("byId('steps').value = 12; byId('method').value = 'ab2'; byId('keep_outline').click()")
    page.click(f"#masks button:nth-child({mask + 1})")
    page.wait("document.body.dataset.state !== 'done'")
    page.wait(DONE)
    page.click("#renew_looks")
    page.wait("document.body.dataset.state !== 'done'")
    page.wait(DONE)
    bottom = page.run("return byId('masks_card').getBoundingClientRect().bottom + window.scrollY")
    page.resize(WIDTH, round(bottom) + MARGIN)
    page.run("document.documentElement.style.overflow = 'hidden'; window.scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(0.5)  # the browser paints
    return page.screenshot()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint of train.py, with looks")
    parser.add_argument("--judge-images", type=Path, required=True, metavar="IMAGES", help="as for app.py")
    parser.add_argument("--judge-masks", type=Path, required=True, metavar="MASKS", help="as for app.py")
    parser.add_argument("--judge-steps", type=positive_int, default=300, help="as for app.py (300)")
    parser.add_argument("--judge-cache", type=Path, default=Path("judges"), metavar="FOLDER", help="as for app.py")
    parser.add_argument("--mask", type=non_negative_int, default=8, help="number of the mask to draw (8)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "page.png", metavar="FILE", help="docs/page.png")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if not (CHROMIUM and DRIVER):
        raise InputError(MISSING)
    names = ("ckpt", "judge_images", "judge_masks", "judge_steps", "judge_cache")
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    with serving(flags) as url, tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as page:
        page.open(url)
        args.output.write_bytes(take_picture(page, args.mask))


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[str]:
    """Address of the page of ``app.py`` with these flags, on a free port."""
    command = [sys.executable, str(ROOT / "app.py"), *flags, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"open (http://\S+)", line):
                yield found[1]
                return
        raise InputError("app.py ended before it served the page: run it with these flags to see why.")
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    run_command(main, parse_args)
