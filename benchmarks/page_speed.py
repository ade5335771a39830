"""Times of the page: from a finished stroke to the image, over HTTP as the browser asks.

    python benchmarks/page_speed.py --ckpt CKPT.pt [--sides 64 128] [--rounds 3]

Each side of the canvas gets a random layout. A canvas of another size than the model's square is drawn in tiles. Two
steps are the page's sketch. A table goes to standard output; docs/page.md records it. Beside the time by the clock it
holds processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import table
from common.arguments import positive_int
from common.errors import CommandParser, run_command
from engine.machine import start_machine
from engine.sampling import load_trained
from page.drawing import Drawer
from page.labels import pack, random_label
from page.service import Service

SETTINGS = {f"{steps} steps": {"method": "ab2", "num_steps": steps} for steps in (2, 4, 6, 8)}
SETTINGS["full setting"] = {"method": "ab2", "num_steps": 32}


def time_page(args: argparse.Namespace, service: Service) -> list[str]:
    """Table: median seconds of each setting by the clock, and of processor time."""
    data = service.drawer.trained.data
    kind = service.drawer.kinds[0]
    rows = []
    for side in args.sides:
        label = random_label(side, side, data.image_size / 5, 0.2, 0, kind, data.num_classes)
        body = {**pack(label), "kind": kind, "blur": 0, "seed": 0, "count": 1, "cfg_scale": 1, "look": None}
        cells = [f"{side} px"]
        for settings in SETTINGS.values():
            draw(service, {**body, **settings, "num_steps": 1})  # warms up
            times = [draw(service, {**body, **settings}) for _ in range(args.rounds)]
            clock, processor = (statistics.median(each) for each in zip(*times, strict=True))
            cells.append(f"{clock:.2f} s ({processor:.2f} s)")
        rows.append(cells)
    title = f"{args.ckpt}, square of {data.image_size} px, {args.rounds} rounds"
    return [title, "", *table(["canvas", *SETTINGS], rows)]


def draw(service: Service, body: dict) -> tuple[float, float]:
    """Seconds from the request to the whole answer: by the clock, and of processor time."""
    begin, used = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(f"{service.url}/api/draw", json.dumps(body).encode(), timeout=600) as reply:
        reply.read()
    return time.perf_counter() - begin, time.process_time() - used


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint of train.py")
    parser.add_argument("--sides", type=positive_int, nargs="+", default=[64, 128], help="of the canvas (64 128)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of each setting (3)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    machine = start_machine("cpu", "float32")
    drawer = Drawer(load_trained(args.ckpt, machine), machine, {"ckpt": args.ckpt})
    with Service(0, drawer) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        print("\n".join(time_page(args, service)))
        service.shutdown()


if __name__ == "__main__":
    run_command(main, parse_args)
