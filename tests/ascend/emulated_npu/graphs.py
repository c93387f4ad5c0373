"""NPU graphs: capture writes down launches, replay runs them again on the same addresses.

torch_npu's ``NPUGraph`` stays as it is, with its C++ checks and memory pools; its Python methods are wrapped.
A recorded launch holds host views, which own no memory: as on the hardware, a graph reads and writes whatever
lies at the captured addresses when it is replayed. Plain Python values (integers, lists such as
``actual_seq_lengths_kv``) are frozen at capture. The one way to change them is torch_npu's own: capture with
``auto_dispatch_capture=True`` and call ``graph.update(cpu_update_input=[{...}])`` once for every replay. The
device waits for that update in the middle of the graph; here a replay without one stalls, and the next use of
the device says so.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

from emulated_npu import counts
from emulated_npu.limits import Refused, need


@dataclass
class Launch:
    """One kernel: a function of host views, and where its results go (None: written in place)."""

    name: str
    call: Callable
    args: tuple
    kwargs: dict[str, Any]
    targets: list[torch.Tensor | None]
    outside: list[tuple[int, StorageWeakRef]] = field(default_factory=list)  # inputs that the graph does not own

    def run(self) -> None:
        """Compute again from what the inputs hold now, into the addresses of the first time."""
        args, kwargs = self.args, self.kwargs
        freed = [index for index, storage in self.outside if storage.expired()]
        if freed:
            # Whatever lies there now. Hardware would not say so either: it is wrong tokens that tell.
            leaves, structure = tree_flatten((args, kwargs))
            for index in freed:
                leaves[index] = torch.full_like(leaves[index], 85)
            args, kwargs = tree_unflatten(leaves, structure)
        results = [leaf for leaf in tree_flatten(self.call(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor)]
        for result, target in zip(results, self.targets, strict=True):
            if target is not None:
                target.copy_(result)


@dataclass
class Recording:
    """Everything one graph launches, in order."""

    launches: list[Launch] = field(default_factory=list)
    owned: set[int] = field(default_factory=set)  # addresses of memory that was allocated during capture
    groups: list["TaskGroup"] = field(default_factory=list)
    updated: bool = False  # the task groups have been given arguments for the next replay
    stalled: bool = False  # a replay waits for them


@dataclass
class TaskGroup:
    """Launches whose arguments may be replaced between replays, under the handle torch_npu holds."""

    recording: Recording
    launches: list[Launch] = field(default_factory=list)
    handle: Any = None


_capturing: Recording | None = None
_break: Callable[[], None] | None = None
_open_group: TaskGroup | None = None
_updating: TaskGroup | None = None
_stalled: Recording | None = None
_groups: dict[int, TaskGroup] = {}


def capturing() -> bool:
    """True between the begin and the end of a capture."""
    return _capturing is not None


def updating() -> bool:
    """True while torch_npu calls operators only to hand their new arguments to a captured graph."""
    return _updating is not None


def record(launch: Launch) -> None:
    """Write a launch down if a graph is being captured."""
    if _capturing is not None:
        _capturing.launches.append(launch)
        if _open_group is not None:
            _open_group.launches.append(launch)


def own(results: Any) -> None:
    """Remember memory that was allocated while a graph is captured: it stays with the graph when tensors go."""
    if _capturing is not None:
        tensors = [leaf for leaf in tree_flatten(results)[0] if isinstance(leaf, torch.Tensor)]
        _capturing.owned.update(t.untyped_storage().data_ptr() for t in tensors if t.device.type == "npu")


def outside_memory(leaves: list[Any]) -> list[tuple[int, StorageWeakRef]]:
    """The inputs of a launch, by their place, whose memory a captured graph reads and does not own."""
    if _capturing is None:
        return []
    return [
        (index, StorageWeakRef(leaf.untyped_storage()))
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
        and leaf.device.type == "npu"
        and leaf.untyped_storage().data_ptr() not in _capturing.owned
    ]


def break_capture() -> None:
    """An operator was refused: a capture that goes on cannot be ended any more."""
    if _capturing is not None and _break is not None:
        _break()


def update_arguments(arguments: dict[str, Any]) -> None:
    """Replace the arguments of the one kernel in the task group that is being updated."""
    kernels = [launch for launch in _updating.launches if not launch.name.endswith("/contiguous")]
    need(len(kernels) == 1, "a task group must hold exactly one kernel")
    kernels[0].kwargs, kernels[0].outside = arguments, []


def refuse_if_stalled() -> None:
    """Refuse to go on when a replay still waits for an update that nobody has sent."""
    if _stalled is not None and _updating is None:
        raise Refused("a replayed graph waits for graph.update(); the device would hang here")


def patch_torch_npu(break_capture: Callable[[], None]) -> None:
    """Wrap the methods of ``torch.npu.NPUGraph`` and the task-group functions it calls."""
    global _break
    _break = break_capture
    from torch_npu.npu import graphs as real

    graph_class = real.NPUGraph
    begin, end, replay, reset, update = (
        graph_class.capture_begin,
        graph_class.capture_end,
        graph_class.replay,
        graph_class.reset,
        graph_class.update,
    )

    def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        global _capturing
        need(os.environ.get("TASK_QUEUE_ENABLE") != "2", "TASK_QUEUE_ENABLE=2 cannot capture graphs")
        begin(graph, *args, **kwargs)
        _capturing = graph._recording = Recording()

    def capture_end(graph: Any) -> None:
        global _capturing
        _capturing = None
        end(graph)

    def replay_launches(graph: Any) -> None:
        global _stalled
        need(not capturing(), "a graph is replayed while another is captured")
        refuse_if_stalled()
        replay(graph)  # refuses a graph that was never captured
        recording = graph._recording
        if recording.groups and not recording.updated:
            _stalled = recording
        else:
            _run(recording)

    def update_graph(graph: Any, cpu_update_input: list[dict[str, Any]]) -> None:
        global _stalled
        update(graph, cpu_update_input)
        graph._recording.updated = True
        if _stalled is graph._recording:
            _stalled = None
            _run(graph._recording)

    def forget(graph: Any) -> None:
        reset(graph)
        graph._recording = None

    graph_class.capture_begin, graph_class.capture_end = capture_begin, capture_end
    graph_class.replay, graph_class.reset, graph_class.update = replay_launches, forget, update_graph
    _patch_task_groups(real)


def _run(recording: Recording) -> None:
    counts.replayed([launch.name for launch in recording.launches])
    with torch.inference_mode(False), torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        for launch in recording.launches:
            launch.run()
    recording.updated = False


def _patch_task_groups(real: Any) -> None:
    group_begin, group_end = real.graph_task_group_begin, real.graph_task_group_end
    update_begin, update_end = real.graph_task_update_begin, real.graph_task_update_end

    def begin_group(stream: Any) -> None:
        global _open_group
        need(capturing(), "a task group outside graph capture")
        group_begin(stream)
        _open_group = TaskGroup(_capturing)

    def end_group(stream: Any) -> Any:
        global _open_group
        group, _open_group = _open_group, None
        group.handle = group_end(stream)
        group.recording.groups.append(group)
        _groups[id(group.handle)] = group
        return group.handle

    def begin_update(stream: Any, handle: Any) -> None:
        global _updating
        update_begin(stream, handle)
        _updating = _groups[id(handle)]

    def end_update(stream: Any) -> None:
        global _updating
        _updating = None
        update_end(stream)
        counts.happened("graph_updates")

    real.graph_task_group_begin, real.graph_task_group_end = begin_group, end_group
    real.graph_task_update_begin, real.graph_task_update_end = begin_update, end_update
