"""Imports go one way, through the rooms of docs/design.md: no circles, and no import for types alone that hides one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import those before it; rooms of one line do not import one another.
ORDER = (
    ("errors", "assets"),
    ("locking", "memory", "reading", "text"),
    ("backends",),
    ("checkpoints",),
    ("models",),
    ("quantization", "speculation"),
    ("drafting", "loading"),
    ("engine",),
    ("generation", "export"),
    ("evaluation", "server"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
SOURCES = sorted((ROOT / "common").rglob("*.py"))


def rooms_imported(path: Path) -> set[str]:
    """The rooms of quasar that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "quasar" else [f"quasar.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("quasar.")}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "common").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_rooms_before_its_own(path):
    room = room_of(path)
    if room == "__init__":  # the facade
        return
    later = {other for other in rooms_imported(path) - {room} if LEVEL[other] >= LEVEL[room]}
    assert not later, f"{room} comes before {', '.join(sorted(later))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_of_a_room_import_one_another_without_circles(path):
    """From a module, along imports within its room, one never comes back."""
    seen: set[Path] = set()
    waiting = list(neighbours(path))
    while waiting:
        at = waiting.pop()
        assert at != path, f"{path} imports itself by way of others"
        if at not in seen:
            seen.add(at)
            waiting += neighbours(at)


def neighbours(path: Path) -> list[Path]:
    """Modules of the same room that a module imports at its top."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("quasar."):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                target = (ROOT / "common").joinpath(*name.split(".")[1:])
                for file in (target.with_suffix(".py"), target / "__init__.py"):
                    if file.exists() and room_of(file) == room_of(path) and file != path:
                        found.append(file)
    return found


def test_the_devices_packages_are_named_in_one_place():
    naming = [
        path
        for path in SOURCES
        if any(
            isinstance(node, (ast.Import, ast.ImportFrom))
            and any(
                name.startswith(("quasar_gpu", "quasar_npu"))
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            )
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert naming == [ROOT / "common" / "backends" / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_for_types_alone_hides_a_circle(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            assert "quasar" not in ast.dump(ast.Module(node.body, [])), "import it at the top, or move it"
