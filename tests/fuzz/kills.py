"""Kills what writes files at every event, and looks at what is left.

    python -m tests.fuzz.kills                    all writers, every event
    python -m tests.fuzz.kills quantize --every 5

An event is a file opened for writing, a rename, an unlink, a chmod, or a folder made or removed. Each is killed twice:
before it happens, and, where a file is written, with half of it on the disk. The process ends at once, as by SIGKILL:
no handler and no `finally` runs. What is left must not look finished, and the next run must end with the same bytes as
one that nobody killed. With --twice the second run is killed as well, at a random event.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quasar import QuasarError, load
from quasar.backends.reference import ReferenceBackend
from quasar.drafting.store import CorpusStore
from quasar.export import workspace
from quasar.export.export import quantize_checkpoint
from quasar.export.settings import ExportSettings
from quasar.models import weights_cache
from quasar.models.loader import build_decoder
from quasar.models.model import LoadOptions
from quasar.models.opening import open_parts
from quasar.models.weights_cache import WeightsCache
from quasar.quantization.recipe import Recipe

MODEL = Path(__file__).parents[1] / "golden" / "small-qwen3"
TEXTS = ["def main():\n    print('hello')\n" * 8, "One two three four five, once I caught a fish alive." * 3]
SEQUENCES = [[(7 * i + n) % 257 for i in range(12)] for n in range(9)]
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
_KILLED = 137


def quantize(folder: Path, **settings: Any) -> None:
    """`quasar quantize` of a small model."""
    quantize_checkpoint(
        str(MODEL),
        folder / "out",
        ExportSettings(recipe=Recipe(0.5, "nearest", 0.4), **settings),
        calibration=TEXTS,
        heldout=TEXTS,
        options=LoadOptions("reference"),
        force=True,
        command="quasar quantize",
        report=lambda line: None,
    )


def finished_checkpoint(folder: Path) -> None:
    """What has a config.json is a whole checkpoint with its tokenizer, under either name."""
    for path in (folder / "out", folder / "out.partial"):
        if (path / "config.json").exists():
            opened = open_parts(path)
            assert opened.tokenizer is not None, f"{path.name} has no tokenizer yet"
            build_decoder(opened.config, opened.source, ReferenceBackend())
    assert not (folder / "out").exists() or (folder / "out" / "config.json").exists(), "out is no checkpoint"


def cache(folder: Path) -> None:
    """A model quantised into the cache."""
    load(
        MODEL,
        device="reference",
        precision="w8a8",
        prompts=TEXTS,
        heldout=TEXTS,
        recipe=Recipe(0.5, "nearest", 0.0),
        force=True,
        cache=WeightsCache(folder, 1),
    )


def finished_cache(folder: Path) -> None:
    """An entry that is listed holds all its weights."""
    for entry in WeightsCache(folder, 1).entries():
        opened = WeightsCache(folder, 1).open(entry.key)
        assert opened is not None, f"{entry.folder} looks finished and is not"
        for index in range(2):
            opened.layer(index)


def store(folder: Path) -> None:
    """A draft store that takes sequences, and is shortened once."""
    with CorpusStore(folder / "store", "fingerprint", 257, most_tokens=40) as opened:
        for sequence in SEQUENCES:
            opened.add(sequence)


def finished_store(folder: Path) -> None:
    """It opens, and holds whole sequences that were given, in their order."""
    path = folder / "store" / "tokens.bin"
    if not path.exists():
        return
    with CorpusStore(folder / "store", "fingerprint", 257, most_tokens=40) as opened:
        held = [tokens for tokens, _ in opened._records(path.read_bytes())]
    assert held == [] or held in [SEQUENCES[a:b] for a in range(10) for b in range(a, 10)], f"the store holds {held}"
    shutil.rmtree(folder / "store")  # a store is a log: what the second run adds comes on top


WRITERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "quantize": (quantize, finished_checkpoint),
    "quantize-static": (lambda folder: quantize(folder, scheme="w8a8-static", lm_head="w8a8"), finished_checkpoint),
    "quantize-ascend": (lambda folder: quantize(folder, format="ascend"), finished_checkpoint),
    "quantize-int4": (lambda folder: quantize(folder, scheme="w4a16", group=32), finished_checkpoint),
    "cache": (cache, finished_cache),
    "store": (store, finished_store),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=f"some of {', '.join(WRITERS)} (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="kill every Nth event (default: 1)")
    parser.add_argument("--twice", action="store_true", help="kill the second run too, at a random event")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # forks have one
    wrong = 0
    for name in args.writers or WRITERS:
        wrong += kill_all(name, args.every, args.twice, random.Random(args.seed))
    return 1 if wrong else 0


def kill_all(name: str, every: int, twice: bool, dice: random.Random) -> int:
    """Kills one writer; prints what it did; returns how many kills ended wrong."""
    write, check = WRITERS[name]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="quasar-kills-") as parent:
        folder = Path(parent) / "run"
        code, events = _forked(write, folder)
        if code:
            raise SystemExit(f"{name}: fails with nobody killing it ({code})")
        whole = _content(folder)
        kills = [(event, torn) for event in range(0, len(events), every) for torn in (False, True)]
        kills = [(event, torn) for event, torn in kills if not torn or events[event].startswith(("open", "save"))]
        for event, torn in kills:
            shutil.rmtree(folder)
            how = f"{name}, event {event} of {len(events)} ({events[event]}), {'in' if torn else 'before'} it"
            try:
                code, _ = _forked(write, folder, event, torn)
                assert code == _KILLED, f"was not killed ({code})"
                check(folder)
                if twice:
                    _forked(write, folder, dice.randrange(len(events)), dice.random() < 0.5)
                    check(folder)
                code, _ = _forked(write, folder)
                assert code == 0, f"the next run fails ({code})"
                left = _content(folder)
                other = sorted(file for file in left.keys() | whole.keys() if left.get(file) != whole.get(file))
                assert not other, f"the next run ends with other {', '.join(other)}"
            except (AssertionError, QuasarError, OSError) as error:
                wrong += 1
                print(f"{how}: {error}", flush=True)
    print(f"{name}: {len(events)} events, {len(kills)} kills{' twice' if twice else ''}, {wrong} wrong", flush=True)
    return wrong


def _content(folder: Path) -> dict[str, bytes]:
    """Every file by its name; of those that say when something was, nothing but that they are there. What begins with a
    dot is a killed run's of the cache, which goes after a day."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.name != "files.json" else b""
    return found


def _forked(write: Callable[[Path], None], folder: Path, kill: int | None = None, torn: bool = False) -> Any:
    """(exit code, events) of a run in a process of its own, killed at an event."""
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 1
        try:
            events = _Events(folder, kill, torn)
            write(folder)
            code = 0
            events.active = False
            os.write(writing, json.dumps(events.seen).encode())
        except QuasarError as error:
            print(f"  {error}")
            code = 2
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    content = b""
    while part := os.read(reading, 65536):
        content += part
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(content or b"[]")


class _Events:
    """What this process does to files below a folder, and its end at one of them."""

    def __init__(self, folder: Path, kill: int | None, torn: bool) -> None:
        self.folder, self.kill, self.torn = str(folder), kill, torn
        self.seen: list[str] = []
        self.active = True
        sys.addaudithook(self._hear)
        for module in (workspace, weights_cache):  # safetensors writes past Python's events
            module.save_file = self._saving(module.save_file)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or event not in (*_EVENTS, "open"):
            return
        path = args[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        if event == "open":
            mode, flags = args[1], args[2]
            if not (set(mode or "") & set("wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR))):
                return
            self._happens(f"open {Path(path).name}", lambda: self._tear(Path(path), mode or ""))
        else:
            self._happens(f"{event.removeprefix('os.')} {Path(path).name}")

    def _tear(self, path: Path, mode: str) -> None:
        """An empty file where one was about to be written; half a record where one was about to be added."""
        self.active = False
        if "a" not in mode:
            path.write_bytes(b"")
        elif path.suffix == ".bin":
            with path.open("ab") as file:
                file.write(b"\x0c\x00\x00\x00half")

    def _saving(self, save: Callable[..., None]) -> Callable[..., None]:
        def saving(tensors: Any, path: Path, **more: Any) -> None:
            def tear() -> None:
                self.active = False
                save(tensors, path, **more)
                with Path(path).open("r+b") as file:
                    file.truncate(Path(path).stat().st_size // 2)

            self._happens(f"save {Path(path).name}", tear)
            save(tensors, path, **more)

        return saving

    def _happens(self, what: str, tear: Callable[[], None] | None = None) -> None:
        if len(self.seen) == self.kill:
            if self.torn and tear is not None:
                tear()
            os._exit(_KILLED)
        self.seen.append(what)


if __name__ == "__main__":
    sys.exit(main())
