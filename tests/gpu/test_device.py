"""What a user is told about a card that is missing, misspelt, too old, too full, or out of memory."""

import sys
from contextlib import nullcontext

import pytest
import torch

from quasar import QuasarError, generate, load
from quasar.backends import get_backend
from quasar.backends.reference import ReferenceBackend
from quasar.cli import main
from quasar.memory import out_of_memory_in_one_line
from quasar_gpu.device import open_cuda, require_free

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. Including non-PyTorch memory, this process has 77.60 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


@pytest.fixture
def cards(monkeypatch):
    """Two cards: an H100, and a T4, which is too old."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H100", "Tesla T4"][_index(index)])


def _index(device: int | torch.device) -> int:
    return device.index if isinstance(device, torch.device) else device


def test_a_card_is_named_by_its_index(cards):
    pytest.importorskip("triton")
    assert open_cuda("cuda") == open_cuda("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:x", "write cuda, or cuda:1 for the second card"),
        ("cuda:-1", "write cuda, or cuda:1 for the second card"),
        ("cuda1", "is unknown; use one of auto, cpu, cuda"),
        ("cuda:2", "CUDA devices here: 2, counted from 0"),
        ("cuda:1", r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0 \(Ampere\) or newer"),
    ],
)
def test_what_cannot_be_opened_is_one_line(cards, device, message):
    with pytest.raises(QuasarError, match=message) as error:
        get_backend(device)
    assert str(error.value).startswith(f"--device {device}")
    assert "\n" not in str(error.value)


def test_without_a_card_the_line_says_so(cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QuasarError, match=r"no CUDA device here .*; use --device cpu"):
        get_backend("cuda")


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_card(cards, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(QuasarError, match="is built without CUDA; install a CUDA build"):
        get_backend("cuda")


def test_a_triton_that_does_not_load_is_one_line(cards, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(QuasarError, match=r"--device cuda: Triton does not load \(.*triton.*\)"):
        get_backend("cuda")


@pytest.fixture
def memory(cards, monkeypatch):
    """An H100 with 10 GB free, and 2 GB more that torch holds and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(10e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(5e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(3e9))


@pytest.mark.parametrize(("version", "has"), [("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0", True)])
def test_dependent_launch_only_where_triton_knows_it(cards, monkeypatch, version, has):
    """torch 2.5 to 2.7 bring Triton 3.1 to 3.3, which refuse the option."""
    triton = pytest.importorskip("triton")
    from quasar_gpu.kernels import launch

    monkeypatch.setattr(launch, "_launching", {})
    monkeypatch.setattr(launch, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 0)][_index(device)])
    monkeypatch.setattr(triton, "__version__", version)
    assert [launch.launching(torch.device("cuda", i)).dependent for i in (0, 1)] == [has, False]
    options = []

    def _some_linear():
        pass

    class Kernel:
        fn = staticmethod(_some_linear)

        def __getitem__(self, grid):
            return lambda *args, **given: options.append(given)

    class OnCard(torch.Tensor):
        device = torch.device("cuda", 0)

    launch.launch(Kernel(), (1,), torch.zeros(1).as_subclass(OnCard), warps=4)
    assert options[0].get("launch_pdl", False) == has
    assert options[0]["DEPENDENT"] == (2 if has else 0)


def test_every_launch_runs_on_its_tensors_card(cards, monkeypatch):
    from quasar_gpu.kernels import launch

    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    with launch._current(torch.device("cuda", 1)):
        pass
    with launch._current(torch.device("cuda", 0)):
        pass
    assert entered == [torch.device("cuda", 1), None]  # and back; nothing for the current one


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_stays_on_its_card(monkeypatch, fails):
    """Its stream, what is waited for, and the current card; and a capture that fails is ended."""
    from quasar_gpu import graphs

    said = []

    class Entered:
        def __init__(self, what, device=None):
            self.what = what
            said.append((what, device))

        def __enter__(self):
            said.append(("enter", self.what))

        def __exit__(self, *_):
            said.append(("leave", self.what))

        def wait_stream(self, other):
            said.append(("waits for", other.what))

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            said.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            said.append(("end",))

    def run():
        if fails:
            raise RuntimeError("refused")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Entered("card", device.index))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Entered("own stream", device.index))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Entered("current stream", device.index))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(("synchronised", device.index)))
    with pytest.raises(RuntimeError, match="refused") if fails else nullcontext():
        graphs.capture(run, torch.device("cuda", 1), "pool")
    begun = [("card", 1), ("enter", "card"), ("synchronised", 1), ("own stream", 1), ("enter", "own stream")]
    begun += [("begin", "pool", "thread_local"), ("end",), ("leave", "own stream")]
    after = [] if fails else [("current stream", 1), ("waits for", "own stream")]
    assert said == [*begun, *after, ("leave", "card")]


def test_what_does_not_fit_is_refused_with_both_figures(memory):
    card = torch.device("cuda", 0)
    require_free(card, int(12e9), "loading it")
    message = r"loading it needs 12\.10 GB, and 12\.00 GB of 80\.00 GB are free on cuda:0 \(NVIDIA H100\)"
    with pytest.raises(QuasarError, match=message):
        require_free(card, int(12.1e9), "loading it")


@pytest.mark.parametrize(("model", "least", "most"), [("dummy:qwen3-8b", 16.3e9, 16.5e9), ("tiny-qwen3", 11e6, 13e6)])
def test_a_model_asks_for_its_weights_before_it_reads_them(monkeypatch, model, least, most):
    asked = []

    def refuse(self: ReferenceBackend, nbytes: int, what: str) -> None:
        asked.append(nbytes)
        raise QuasarError(f"{what} does not fit")

    monkeypatch.setattr(ReferenceBackend, "require_memory", refuse)
    with pytest.raises(QuasarError, match=f"loading {model} does not fit"):
        load(model, device="reference", precision="full")
    assert len(asked) == 1
    assert least < asked[0] < most


def test_running_out_of_memory_is_one_line():
    expected = r"the device is out of memory: 20\.00 MiB more were needed, 1\.50 GiB of 79\.11 GiB were free; [^\n]*$"
    with pytest.raises(QuasarError, match=expected), out_of_memory_in_one_line():
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    with pytest.raises(QuasarError, match="more was needed; end what else"), out_of_memory_in_one_line():
        raise torch.OutOfMemoryError("in other words")


def test_the_library_and_the_command_line_say_it_too(monkeypatch, shipped, capsys):
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(ReferenceBackend, "new_slot", full)
    model = shipped("qwen3", device="reference")
    with pytest.raises(QuasarError, match="out of memory"):
        generate(model, [1, 2, 3], max_new_tokens=2).result()
    assert main(["bench", "step", "--device", "reference", "--precisions", "full", "--repeats", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("quasar bench: the device is out of memory: 20.00 MiB more were needed")
    assert err.count("\n") == 1
