"""The folder that a checkpoint is written to: beside its final name until everything is there, and resumable."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quasar.checkpoints.folder import read_json
from quasar.errors import QuasarError
from quasar.locking import locked

_RESUME, _STATE, _FIGURES = "resume.json", "hidden_states.resume", "figures"
_COPIED = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")


def refuse_existing(output: Path) -> None:
    """Raises QuasarError if the folder that is to be written is there already, and not by a run that was killed when
    all but the removal of its last trace was done."""
    if (output.exists() or output.is_symlink()) and not (output / _RESUME).exists():
        raise QuasarError(f"--output {output} exists; name a new folder, or remove it")


class Workspace:
    """The folder `output`.partial, which becomes `output` when it is complete.

    Killed at any moment, it is in one of four states: without resume.json (nothing was begun), with hidden states of
    some layer, with the figures of a finished run, or, already under its own name, with a resume.json left to remove.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.output, self.folder = output, output.with_name(output.name + ".partial")
        self._identity = identity
        if (output / _RESUME).exists():  # renamed, and killed before the last unlink
            self.folder = output
        else:
            refuse_existing(output)
        if not self.folder.exists():
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise QuasarError(f"--output {output}: cannot be made ({error.strerror})") from None
        if not (self.folder / _RESUME).exists():
            if any(path.name != f"{_RESUME}.tmp" for path in self.folder.iterdir()):
                raise QuasarError(f"{self.folder} is no interrupted run that could resume; remove it")
            self.write_text(_RESUME, json.dumps(identity, indent=1))
            return
        begun = read_json(self.folder / _RESUME)
        other = [name for name in identity if begun.get(name) != identity[name]]
        if other:
            raise QuasarError(
                f"{self.folder} was begun with another {' and '.join(other)}; remove it, or repeat that command"
            )

    def alone(self) -> AbstractContextManager[None]:
        """Raises QuasarError while another process writes into the folder."""
        refusal = f"{self.folder}: another process writes into it; wait for that one, or name another --output"
        return locked(self.folder, refusal)

    @property
    def figures(self) -> dict[str, Any] | None:
        """What `complete` was given, by a run that was killed after it."""
        return read_json(self.folder / _RESUME).get(_FIGURES)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A name to write to, which becomes `name` if all goes well. Errors are the disk's."""
        path, beside = self.folder / name, self.folder / f"{name}.tmp"
        try:
            yield beside
            if beside.exists():
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                beside.chmod(0o644)  # safetensors makes files that a server under another name could not read
                beside.replace(path)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise QuasarError(
                f"{path}: cannot be written ({reason}); put that right and repeat the command, it resumes"
            ) from None
        finally:
            beside.unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """A safetensors file."""
        with self.writing(name) as path:
            save_file(tensors, path, metadata={"format": "pt"})

    def write_text(self, name: str, text: str) -> None:
        """A UTF-8 file."""
        with self.writing(name) as path:
            path.write_text(text, encoding="utf-8")

    def save_state(self, step: int, hidden: list[Tensor]) -> None:
        """Everything before `step` is written, and these hidden states go into it."""
        self.write_tensors(_STATE, {f"{step}.{i}": x.cpu().clone() for i, x in enumerate(hidden)})

    def state(self) -> tuple[int, list[Tensor]]:
        """What save_state saved last; step 0 if nothing yet."""
        if not (self.folder / _STATE).exists():
            return 0, []
        try:
            tensors = load_file(self.folder / _STATE)
        except (OSError, SafetensorError) as error:
            raise QuasarError(f"{self.folder / _STATE}: cannot be read ({error}); remove {self.folder}") from None
        step = int(next(iter(tensors)).partition(".")[0])
        return step, [tensors[f"{step}.{i}"] for i in range(len(tensors))]

    def index(self, shard: Any, steps: int, name: str) -> dict[str, str]:
        """Writes the index over all shards; returns which tensor is where."""
        where, total = {}, 0
        for step in range(steps):
            with safe_open(self.folder / shard(step), framework="pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), shard(step))
            total += (self.folder / shard(step)).stat().st_size
        content = {"metadata": {"total_size": total}, "weight_map": where}
        self.write_text(name, json.dumps(content, indent=2) + "\n")
        return where

    def copy_from(self, folder: Path) -> None:
        """Tokenizer, chat template, generation config, licences: all that is not weights or written here."""
        for path in sorted(folder.iterdir()):
            wanted = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
            own = path.name in ("config.json", _RESUME) or path.name.endswith(".index.json")
            if wanted and not own and path.is_file():
                with self.writing(path.name) as beside:
                    shutil.copyfile(path, beside)

    def require_space(self, needed: int) -> None:
        """Raises QuasarError if what is still to be written will not fit."""
        here = sum(path.stat().st_size for path in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        if needed > here + free:
            if not (self.folder / _STATE).exists():
                self.discard()
            short = f"{free / 1e9:.1f} GB are free on the disk; {(needed - here) / 1e9:.1f} GB are needed"
            raise QuasarError(f"--output {self.output}: {short}")

    def discard(self) -> None:
        """Removes everything that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def note(self, name: str) -> str | None:
        """A text that an interrupted run wrote, None if it did not."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    def complete(self, figures: dict[str, Any]) -> None:
        """Every file is written: from here on nothing is computed again, whatever happens."""
        self.write_text(_RESUME, json.dumps(self._identity | {_FIGURES: figures}, indent=1))

    def finish(self) -> None:
        """Gives the folder its name."""
        for path in sorted(self.folder.glob("*.resume")):
            path.unlink()
        if self.folder != self.output:
            refuse_existing(self.output)
            self.folder.rename(self.output)
        (self.output / _RESUME).unlink()
