"""`quasar cache list | clear`: what was quantised and kept, and how to be rid of it."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from quasar.errors import QuasarError
from quasar.models.weights_cache import Entry, WeightsCache


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cache",
        help="list or clear what was quantised and kept",
        description="Quantised weights are kept, so that the next start only maps them: in QUASAR_CACHE, else "
        "XDG_CACHE_HOME/quasar, else ~/.cache/quasar. QUASAR_CACHE_GB bounds the folder (default 20; 0: keep nothing); "
        "the least recently used go first.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="list|clear")
    listing = kinds.add_parser("list", help="what is kept", description="Show what is kept, the latest used last.")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(run=run_list)
    clear = kinds.add_parser("clear", help="remove it", description="Remove everything, or the entries named.")
    clear.add_argument("keys", nargs="*", metavar="KEY", help="as `quasar cache list` shows them (default: all)")
    clear.set_defaults(run=run_clear)


def run_list(args: argparse.Namespace) -> None:
    cache = WeightsCache()
    entries = cache.entries()
    if args.json:
        rows = [{"key": e.key, "bytes": e.nbytes, "used": e.used, **e.about} for e in entries]
        print(json.dumps({"folder": str(cache.folder), "most_bytes": cache.most_bytes, "entries": rows}))
        return
    for entry in entries:
        print(_line(entry))
    total = sum(entry.nbytes for entry in entries)
    bound = f"of at most {cache.most_bytes / 1e9:g} GB" if cache.enabled else "(switched off)"
    print(f"{len(entries)} quantised models, {total / 1e9:.2f} GB {bound}, in {cache.folder}")


def run_clear(args: argparse.Namespace) -> None:
    cache = WeightsCache()
    if not args.keys:
        print(f"freed {cache.clear() / 1e9:.2f} GB in {cache.folder}")
        return
    entries = {entry.key: entry for entry in cache.entries()}
    chosen = []
    for key in args.keys:
        matching = [entry for name, entry in entries.items() if name.startswith(key)]
        if len(matching) != 1:
            what = "no entry" if not matching else f"{len(matching)} entries"
            raise QuasarError(f"KEY {key}: {what} of {cache.folder}; quasar cache list shows them")
        chosen += matching
    print(f"freed {cache.remove(chosen) / 1e9:.2f} GB in {cache.folder}")


def _line(entry: Entry) -> str:
    about = entry.about
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    figures = f", mean KL {about['mean_kl']:.1e}" if isinstance(about.get("mean_kl"), float) else ""
    return (
        f"{entry.key[:12]}  {about.get('model', '?')}  {about.get('precision', '?')}{figures}, "
        f"{entry.nbytes / 1e6:.1f} MB, used {when}"
    )
