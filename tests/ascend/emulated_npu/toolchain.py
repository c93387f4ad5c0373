"""Compile the host-memory ACL runtime, load it, and switch the emulation on.

torch_npu needs six CANN libraries by name. One holds the symbols; the others are empty and depend on it.
Each carries its SONAME, so once they are loaded from here the dynamic linker finds them for torch_npu
wherever they lie: no LD_LIBRARY_PATH, and so no second process.

Environment: ``QUASAR_ASCEND_SOC`` names the chip (default ``Ascend910B2``; ``Ascend310P3`` is an inference
card), ``CC`` the compiler. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` must be set before torch is imported.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("host_runtime.c")
BUILD = Path(__file__).parent.parent / "build"  # git ignores every build/
RUNTIME = "libascendcl.so"
EMPTY = ("libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")


def compiler() -> str | None:
    """Path of the C compiler, or None."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def unavailable() -> str | None:
    """Why the emulation cannot run here, as one plain line; None when it can."""
    if sys.platform != "linux":
        return "torch_npu is built for Linux only"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed here (bash scripts/test_ascend.sh makes the environment that has it)"
    if compiler() is None:
        return "no C compiler (install gcc, or name one in CC)"
    return None


def build() -> Path:
    """Compile the libraries unless this very source was compiled before; the folder that holds them.

    Raises:
        RuntimeError: the compiler failed; its message is included.
    """
    folder = BUILD / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    BUILD.mkdir(exist_ok=True)
    # Built aside and renamed, so that a second process never loads half a library.
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        draft = Path(scratch) / "libraries"
        draft.mkdir()
        _compile(draft / RUNTIME, str(SOURCE))
        for name in EMPTY:
            # An indirect symbol lookup starts at the named library and follows its dependencies.
            _compile(draft / name, "-x", "c", os.devnull, "-Wl,--no-as-needed", f"-L{draft}", "-lascendcl")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    return folder


def _compile(target: Path, *arguments: str) -> None:
    command = [compiler(), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{target.name}", "-o", target, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot compile {target.name}:\n{done.stderr}")


def load_runtime() -> ctypes.CDLL:
    """Build and load the libraries for the whole process; the one that holds the symbols."""
    folder = build()
    runtime = ctypes.CDLL(str(folder / RUNTIME), mode=ctypes.RTLD_GLOBAL)
    for name in EMPTY:
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    runtime.emulated_host_waits.restype = ctypes.c_int64
    return runtime


_installed = False


def install() -> None:
    """Make ``npu:0`` usable in this process: load the runtime, import torch_npu, emulate its operators.

    Covers this thread and every thread started later. Calling it again does nothing.

    Raises:
        RuntimeError: torch was imported with device auto-loading on, or compilation failed.
    """
    global _installed
    if _installed:
        return
    if "torch" in sys.modules and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        raise RuntimeError("set TORCH_DEVICE_BACKEND_AUTOLOAD=0 before torch is imported")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    runtime = load_runtime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch_npu's own import-time notices about CANN's absence
        import torch
        import torch_npu  # noqa: F401

        torch.npu.init()

    from emulated_npu import counts, graphs, schemas
    from emulated_npu.device import EmulatedDevice

    counts.watch(runtime)
    graphs.patch_torch_npu(runtime.emulated_break_capture)
    schemas.watch_calls()
    EmulatedDevice().__enter__()

    # Dispatch modes belong to a thread; a server or a streamer computes in others.
    run = threading.Thread.run

    def run_on_device(thread: threading.Thread) -> None:
        with EmulatedDevice():
            run(thread)

    threading.Thread.run = run_on_device
    _installed = True
