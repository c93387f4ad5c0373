"""What was quantised once is kept in the user's cache folder, so that the next start only maps it.

An entry is a folder named by a hash of everything that its weights depend on: the checkpoint's bytes, the settings,
the texts, the device's arithmetic and the source code that quantises. It holds a safetensors file for each decoder
layer and entry.json, which is written last; it takes its name when all are there. Each file's checksum is compared
before its tensors are used. The least recently used entries go when the folder outgrows its bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quasar.checkpoints import weights as kinds
from quasar.checkpoints.weights import HeadWeights, LayerWeights, LinearWeights
from quasar.errors import QuasarError
from quasar.reading import parse_json

DEFAULT_GIGABYTES = 20.0
_ENTRY = "entry.json"
_STATES = "files.json"  # checksums of checkpoint files, by their place, size and time
_EMBEDDING = "embedding"
_ABANDONED_SECONDS = 86400  # a folder without entry.json that old belongs to a run that was killed
_BLOCK = 1 << 22

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One quantised model in the cache."""

    key: str
    folder: Path
    about: dict[str, Any]  # model, precision, settings and figures, as they were written
    nbytes: int
    used: float  # seconds since the epoch


class WeightsCache:
    """The folder of one user. What goes wrong in it costs time, never a result: reading gives None, writing warns."""

    def __init__(self, folder: Path | None = None, gigabytes: float | None = None) -> None:
        """folder: default QUASAR_CACHE, else XDG_CACHE_HOME/quasar, else ~/.cache/quasar. gigabytes: the bound, default
        QUASAR_CACHE_GB, else 20; 0 switches the cache off."""
        self.folder = (folder or _default_folder()) / "quantized"
        self.most_bytes = int((_default_gigabytes() if gigabytes is None else gigabytes) * 1e9)

    @property
    def enabled(self) -> bool:
        """Whether anything is read from it or written to it."""
        return self.most_bytes > 0

    def key(self, files: Iterable[Path], settings: Any) -> str:
        """A name for what quantising these files with these settings (anything that JSON holds) gives."""
        digests = [[path.name, self._digest(path)] for path in sorted(files)]
        described = json.dumps([digests, settings], sort_keys=True, default=str)
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    def open(self, key: str, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> CachedWeights | None:
        """The weights of this name, mapped; None where they are absent or damaged. place: a backend's own."""
        folder = self.folder / key
        try:
            found = CachedWeights(folder, place)
            os.utime(folder / _ENTRY)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            log.warning("%s: damaged (%s); it is made again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return found

    def writer(self, key: str) -> CacheWriter | None:
        """What takes a new entry's weights; None where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            return CacheWriter(self, key, Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.folder)))
        except OSError as error:
            log.warning("%s: cannot be written (%s); what is quantised is not kept", self.folder, error.strerror)
            return None

    def entries(self) -> list[Entry]:
        """All of them, the least recently used first."""
        found = []
        for path in self.folder.glob(f"*/{_ENTRY}"):
            if path.parent.name.startswith("."):
                continue
            with contextlib.suppress(OSError, ValueError):
                about = _read_entry(path.parent)["about"]
                found.append(Entry(path.parent.name, path.parent, about, _bytes_in(path.parent), path.stat().st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def remove(self, entries: Iterable[Entry]) -> int:
        """Removes entries; returns the bytes that they took."""
        freed = 0
        for entry in entries:
            shutil.rmtree(entry.folder, ignore_errors=True)
            freed += entry.nbytes
        return freed

    def clear(self) -> int:
        """Removes everything, half-written folders too; returns the bytes of the finished entries."""
        entries = self.entries()
        freed = sum(entry.nbytes for entry in entries)
        shutil.rmtree(self.folder, ignore_errors=True)
        return freed

    def _trim(self, keep: str) -> None:
        """Removes the least recently used entries until the rest fits the bound; `keep` goes only where it alone is
        too large."""
        entries = sorted(self.entries(), key=lambda entry: (entry.key == keep, entry.used))
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= self.most_bytes:
                break
            if entry.key == keep:
                log.warning("%s: its %.1f GB exceed the cache's bound, QUASAR_CACHE_GB", entry.folder, total / 1e9)
            total -= self.remove([entry])

    def _sweep(self) -> None:
        for path in self.folder.glob(".*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime >= time.time() - _ABANDONED_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _digest(self, path: Path) -> str:
        """sha256 of a file, remembered by its place, size and times: a large checkpoint is not read at every start."""
        status = path.stat()
        name = str(path.resolve())
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._states()
        if name in known and known[name][:-1] == state:
            return known[name][-1]
        digest = _sha256(path)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {place: value for place, value in self._states().items() if Path(place).exists()}
            _write_whole(self.folder / _STATES, json.dumps(kept | {name: [*state, digest]}))
        return digest

    def _states(self) -> dict[str, list[Any]]:
        try:
            states = parse_json((self.folder / _STATES).read_text(encoding="utf-8"))
            return {k: v for k, v in states.items() if isinstance(v, list) and len(v) == 4}
        except (OSError, ValueError, AttributeError):
            return {}


class CacheWriter:
    """Takes the parts of a model one after the other, in any order, and makes them an entry at `finish`."""

    def __init__(self, cache: WeightsCache, key: str, folder: Path) -> None:
        self._cache, self._key, self._folder = cache, key, folder
        self._parts: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._failed = False

    def embedding(self, table: Tensor) -> None:
        """[vocab, hidden]."""
        self._write(_EMBEDDING, {"table": table}, {})

    def layer(self, weights: LayerWeights) -> None:
        """One decoder layer."""
        self._write(f"layer-{weights.index:05}", *_flattened(weights))

    def head(self, weights: HeadWeights, embedding: Tensor) -> None:
        """The last norm and lm_head; where that is the embedding itself, it is not written a second time."""
        tensors, described = _flattened(weights)
        for name in [name for name, tensor in tensors.items() if _same(tensor, embedding)]:
            del tensors[name]
            described[name] = _EMBEDDING
        self._write("head", tensors, described)

    def finish(self, about: dict[str, Any]) -> None:
        """Gives the entry its name. about: for listings, and whatever the reader wants back."""
        if self._failed:
            return
        try:
            entry = {"about": about, "parts": self._parts, "digests": self._digests}
            _write_whole(self._folder / _ENTRY, json.dumps(entry | {"digest": _digest_of(entry)}, indent=1))
            target = self._cache.folder / self._key
            shutil.rmtree(target, ignore_errors=True)
            self._folder.rename(target)
            self._cache._trim(self._key)
        except OSError as error:
            self._fail(error)

    def abandon(self) -> None:
        """Removes what was written."""
        self._failed = True
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, part: str, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            path = self._folder / f"{part}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
            self._parts[part], self._digests[part] = described, _sha256(path)
        except (OSError, SafetensorError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        log.warning("%s: cannot be written (%s); what is quantised is not kept", self._cache.folder, error)
        self.abandon()


class CachedWeights:
    """An entry as a source of weights: each part is checked and mapped when it is asked for."""

    def __init__(self, folder: Path, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        entry = _read_entry(folder)
        self.folder, self.place, self.about = folder, place, entry["about"]
        self._parts, digests = entry["parts"], entry["digests"]
        for part, digest in digests.items():
            if _sha256(folder / f"{part}.safetensors") != digest:
                raise ValueError(f"{part}.safetensors has another checksum than when it was written")
        self.nbytes = _bytes_in(folder)

    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._tensors(_EMBEDDING)["table"]

    def layer(self, index: int) -> LayerWeights:
        """The decoder layer `index`."""
        part = f"layer-{index:05}"
        return _restored(LayerWeights, "", self._tensors(part), self._parts[part])

    def head(self, embedding: Tensor) -> HeadWeights:
        """The last norm and lm_head; embedding is what `embedding()` gave."""
        described = dict(self._parts["head"])
        tensors = self._tensors("head")
        for name in [name for name, value in described.items() if value == _EMBEDDING]:
            tensors[name] = embedding
            del described[name]
        return _restored(HeadWeights, "", tensors, described)

    def finish(self) -> None:
        """Nothing is left over in what was written here."""

    def _tensors(self, part: str) -> dict[str, Tensor]:
        with safe_open(self.folder / f"{part}.safetensors", framework="pt") as file:
            return {name: self.place(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping


def _flattened(weights: LayerWeights | HeadWeights | LinearWeights, at: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tensors of a dataclass by their path in it, and everything else by path: class names and numbers."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for field in fields(weights):
        name, value = f"{at}{field.name}", getattr(weights, field.name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (int, float, str)) or value is None:
            described[name] = value
        else:
            described[name] = {"class": type(value).__name__}
            inner_tensors, inner = _flattened(value, f"{name}.")
            tensors |= inner_tensors
            described |= inner
    return tensors, described


def _restored(kind: Any, at: str, tensors: dict[str, Tensor], described: dict[str, Any]) -> Any:
    values = {}
    for field in fields(kind):
        name = f"{at}{field.name}"
        if name in tensors:
            values[field.name] = tensors[name]
            continue
        value = described[name]
        if isinstance(value, dict):
            value = _restored(getattr(kinds, value["class"]), f"{name}.", tensors, described)
        values[field.name] = value
    return kind(**values)


def _read_entry(folder: Path) -> dict[str, Any]:
    """What a finished entry says of itself. Raises ValueError where it does not say what was written."""
    entry = parse_json((folder / _ENTRY).read_text(encoding="utf-8"))
    if not isinstance(entry, dict) or entry.pop("digest", None) != _digest_of(entry):
        raise ValueError(f"{_ENTRY} has another checksum than when it was written")
    return entry


def _digest_of(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and torch.equal(tensor, other)


def source_digest(folders: Sequence[Path]) -> str:
    """Of the Python files under these folders: what is quantised by changed code is quantised anew."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in _python_files(folder)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _python_files(folder: Path) -> Iterator[Path]:
    yield from [folder] if folder.is_file() else folder.rglob("*.py")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    """Under another name first, so that no reader finds half of it."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _default_folder() -> Path:
    if os.environ.get("QUASAR_CACHE"):
        return Path(os.environ["QUASAR_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quasar"


def _default_gigabytes() -> float:
    text = os.environ.get("QUASAR_CACHE_GB")
    if text is None:
        return DEFAULT_GIGABYTES
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise QuasarError(f"QUASAR_CACHE_GB is {text!r}; it should be a number of gigabytes, 0 for no cache")
    return value
