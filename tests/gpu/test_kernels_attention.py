"""Rope, append and split attention of batches over pages, against the reference backend."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, Segment, Slot
from quasar.backends.reference import ReferenceBackend

pytest.importorskip("triton")
from quasar_gpu import batches
from quasar_gpu.backend import CudaBackend
from quasar_gpu.kernels import attention
from quasar_gpu.kernels.launch import MOST_ROWS
from quasar_gpu.slots import PagedSlot

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPACITY = 300


@pytest.fixture(autouse=True)
def _quick(kernel_device, monkeypatch):
    """The interpreter does not loop over what is masked."""
    if kernel_device.type == "cpu":
        monkeypatch.setattr(attention, "_UNROLLED", 1)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Layer:
    """One layer's attention on a backend."""

    backend: CudaBackend | ReferenceBackend
    spec: AttentionSpec
    cos: torch.Tensor
    sin: torch.Tensor

    def slot(self, length: int, seed: int = 0) -> Slot:
        """With `length` random positions; those behind are NaN: nobody may read them."""
        made = self.backend.new_slot(1, self.spec.kv_heads, CAPACITY, self.spec.head_dim)
        k, v = (torch.full((1, self.spec.kv_heads, CAPACITY, self.spec.head_dim), float("nan")) for _ in range(2))
        for i, half in enumerate((k, v)):
            half[:, :, :length] = random(self.spec.kv_heads, length, self.spec.head_dim, seed=2 * seed + i + 7)
        k, v = k.to(self.backend.device, self.backend.dtype), v.to(self.backend.device, self.backend.dtype)
        if isinstance(made, PagedSlot):
            made.write(0, k, v)
        else:
            made.k.copy_(k)
            made.v.copy_(v)
        made.length = length
        return made

    def __call__(self, qkv: torch.Tensor, *segments: Segment, quant: ActivationQuant | None = None):
        batch = Batch(segments)
        qkv = qkv.to(self.backend.device, self.backend.dtype)
        ((cos, sin),) = self.backend.rope_rows(self.cos, self.sin, [self.spec], batch)
        q = self.backend.append_rotated(qkv, self.spec, cos, sin, batch, 0)
        return self.backend.attend(q, self.spec, batch, 0, quant)


def layer(backend, heads, kv_heads, head_dim, normed=True) -> Layer:
    angles = random(CAPACITY, head_dim // 2) * 3
    norms = [random(head_dim, seed=seed).to(backend.dtype).to(backend.device) if normed else None for seed in (3, 4)]
    spec = AttentionSpec(heads, kv_heads, head_dim, *norms, 1e-6)
    return Layer(backend, spec, angles.cos().to(backend.device), angles.sin().to(backend.device))


def qkv_of(layer: Layer, rows: int, seed: int = 0) -> torch.Tensor:
    spec = layer.spec
    return random(rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, seed=seed).to(layer.backend.dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "rows"),
    [(4, 1, 32, 0, 1), (6, 2, 24, 127, 6), (2, 2, 16, 128, 16), (7, 1, 16, 255, 3), (8, 2, 80, 60, 5)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(kernel_device, dtype, heads, kv_heads, head_dim, length, rows):
    mine = layer(CudaBackend(kernel_device, dtype), heads, kv_heads, head_dim, normed=rows != 5)
    exact = layer(ReferenceBackend(), heads, kv_heads, head_dim, normed=rows != 5)
    if dtype != torch.float32:
        exact.spec = AttentionSpec(
            heads,
            kv_heads,
            head_dim,
            *(n if n is None else n.cpu().float() for n in (mine.spec.q_norm, mine.spec.k_norm)),
            1e-6,
        )
    qkv = qkv_of(mine, rows)
    slots = mine.slot(length), exact.slot(length)
    if dtype != torch.float32:
        for half in (slots[1].k, slots[1].v):
            half.copy_(half.to(dtype).float())
    got = mine(qkv, Segment(slots[0], [0] * rows))
    want = exact(qkv.float(), Segment(slots[1], [0] * rows))
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().float(), want, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(slots[0].k.cpu().float(), slots[1].k, equal_nan=True, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slots[0].v.cpu().float(), slots[1].v, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other(kernel_device, dtype):
    """Not on its window, which crosses a split here, nor on other sequences, nor on how many rows fill the batch."""
    mine = layer(CudaBackend(kernel_device, dtype), 4, 2, 16)
    qkv = qkv_of(mine, 8)
    slot = mine.slot(125)
    window = mine(qkv[:6], Segment(slot, [0] * 6)).clone()
    alone = mine.slot(125)
    for i in range(6):
        assert torch.equal(mine(qkv[i : i + 1], Segment(alone, [0]))[0], window[i])
        alone.commit(1)
    both = mine(qkv, Segment(mine.slot(3, seed=5), [0, 0]), Segment(mine.slot(125), [0] * 6))
    other = mine(torch.cat([qkv[2:], qkv[:2]]), Segment(mine.slot(125), [0] * 6), Segment(mine.slot(3, seed=5), [0, 0]))
    assert torch.equal(both[:2], other[6:])
    assert torch.equal(both[2:], other[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 126, 128])
def test_a_trees_rows_are_those_of_chains(kernel_device, dtype, length):
    """Bit for bit, over the end of a split; and the path that is committed is the chain's."""
    mine = layer(CudaBackend(kernel_device, dtype), 4, 2, 16)
    parents = [-1, 0, 0, 1, -1, 3, 4]
    qkv = qkv_of(mine, len(parents))
    tree_slot = mine.slot(length)
    segment = Segment(tree_slot, [0] * len(parents), parents)
    tree = mine(qkv, segment).clone()
    for row in (2, 5, 6):
        path = segment.path(row)
        chain_slot = mine.slot(length)
        chain = mine(qkv[path], Segment(chain_slot, [0] * len(path)))
        assert torch.equal(chain, tree[path])
    path = segment.path(5)
    chain_slot = mine.slot(length)
    mine(qkv[path], Segment(chain_slot, [0] * len(path)))
    tree_slot.commit(path)
    chain_slot.commit(len(path))
    for one, other in ((tree_slot.k, chain_slot.k), (tree_slot.v, chain_slot.v)):
        assert torch.equal(one[:, :, : tree_slot.length], other[:, :, : tree_slot.length])


def test_quantised_attention_is_attention_quantised(kernel_device):
    mine = layer(CudaBackend(kernel_device, torch.bfloat16), 6, 2, 24)
    qkv = qkv_of(mine, 4)
    plain = mine(qkv, Segment(mine.slot(130), [0] * 4)).clone()
    got = mine(qkv, Segment(mine.slot(130), [0] * 4), quant=ActivationQuant())
    want = ReferenceBackend("cpu", torch.bfloat16).quantize(plain.cpu(), ActivationQuant())
    assert torch.equal(got.values.cpu(), want.values)
    assert torch.equal(got.scale.cpu(), want.scale)


# What the kernels are told.


class Pages:
    """A slot without memory."""

    def __init__(self, length):
        self.length, self.free = length, 10**6
        self.pages = [type("Page", (), {"at": 1000 * i})() for i in range(-(-(length + 600) // attention.PAGE))]

    def own(self, first, last):
        assert first == self.length

    def address(self, position):
        page, row = divmod(position, attention.PAGE)
        return self.pages[page].at + row


def tables(monkeypatch, *segments, tile=16):
    monkeypatch.setattr(batches, "PagedSlot", Pages)
    return batches.tables_of(Batch(segments), tile)


def test_every_row_attends_to_each_split_once(monkeypatch):
    segments = [Segment(Pages(130), [0] * 20), Segment(Pages(3000), [0]), Segment(Pages(0), [0] * 3, [-1, -1, 0])]
    made = tables(monkeypatch, *segments)
    seen = {}
    for row, rows, begin, end, *_, partial in made.items:
        for i in range(rows):
            seen.setdefault(row + i, []).append((begin, end, partial + i))
    _, positions, _, splits, partial_at, partial_step = made.per_row
    for row in range(24):
        parts = [part for part in sorted(seen[row]) if part[0] <= positions[row]]
        assert parts[0][0] == 0
        assert all(before[1] == after[0] for before, after in pairwise(parts))
        assert parts[-1][1] > positions[row]
        assert [part[2] for part in parts] == [partial_at[row] + i * partial_step[row] for i in range(splits[row])]
    partials = [part[2] for parts in seen.values() for part in parts]
    assert len(partials) == len(set(partials)) == made.shape.partials
    assert attention.split_end(2048) == 2560
    assert [begin for begin, *_ in sorted(seen[20])][16:18] == [2048, 2560]


def test_every_row_is_appended_before_it_is_read(monkeypatch):
    """By the program that reads it; and those of a long prompt by an earlier launch."""
    made = tables(monkeypatch, Segment(Pages(120), [0] * 40))
    for row, rows, begin, end, first, last, *_ in made.items:
        own = {r for r in range(row + rows) if begin <= 120 + r < end}
        assert set(range(first, last)) == own
    long = tables(monkeypatch, Segment(Pages(120), [0] * 200))
    appending, *attending = long.launched
    assert {r for i in appending.items for r in range(*long.items[i][4:6])} == set(range(200))
    assert all(long.items[i][1] == 0 for i in appending.items)
    assert all(long.items[i][4] == long.items[i][5] for part in attending for i in part.items)
    assert [row for part in attending for row in part.rows] == list(range(200))


def test_a_long_prompt_attends_in_stretches_that_bound_the_workspace(monkeypatch):
    made = tables(monkeypatch, Segment(Pages(30_000), [0] * 512))
    assert made.shape.partials <= batches._MOST_PARTIALS
    assert [row for part in made.launched for row in part.rows] == list(range(512))
    assert len(made.launched) > 2
    # One workspace for each power of two, whatever the number of rows: at most twice the largest.
    sizes = {tables(monkeypatch, Segment(Pages(30_000), [0] * n)).shape.bucket().partials for n in range(1, 17)}
    assert sum(sizes) <= 2 * max(sizes)
    assert 4 * attention.partial_floats(max(sizes), 32, 128) <= 20e6  # Qwen3-8B, 30k tokens of context, 16 rows


def test_a_batch_runs_in_the_next_larger_bucket(monkeypatch):
    shapes = {}
    for rows in range(1, 65):
        shape = tables(monkeypatch, Segment(Pages(128), [0] * rows)).shape
        bucket = shape.bucket()
        assert bucket.rows >= rows
        assert bucket.items >= shape.items
        assert bucket.partials >= shape.partials
        shapes.setdefault(bucket, []).append(rows)
    assert sorted({bucket.rows for bucket in shapes}) == list(batches.ROW_BUCKETS)
    growing = {tables(monkeypatch, Segment(Pages(n), [0] * 6)).shape.bucket() for n in range(0, 4000, 6)}
    assert len(growing) <= 3  # a growing context needs few graphs


def test_tables_are_one_copy(monkeypatch):
    """In the layout that kernels read; those of the tree, which are long, only where there is one."""
    made = tables(monkeypatch, Segment(Pages(5), [7, 8, 9], [-1, 0, 0]), Segment(Pages(200), [4]))
    bucket = made.shape.bucket()
    numbers = torch.zeros(batches.size_of(bucket), dtype=torch.int64)
    flat = made.numbers(bucket)
    numbers[: len(flat)] = torch.tensor(flat)
    found = batches.views(numbers, bucket)
    assert found.ids.tolist() == [7, 8, 9, 4]
    assert found.positions.tolist() == [5, 6, 6, 200]
    assert found.splits.tolist() == [1, 1, 1, 2]
    assert found.segments[:2].tolist() == [[5, 0, 5, 0], [200, 1, attention.NEVER, 0]]
    assert found.pages[:3].tolist() == [0, 0, 1000]
    ancestors = found.ancestors.view(-1, MOST_ROWS)
    assert ancestors[2, :2].tolist() == [5, 7]
    assert found.items[len(made.items) :].sum() == 0
    assert len(tables(monkeypatch, Segment(Pages(5), [7, 8, 9])).numbers(bucket)) < len(flat)


# Pages.


def test_prefixes_share_pages_until_they_are_written_to(kernel_device):
    backend = CudaBackend(kernel_device, torch.bfloat16)
    first, second = (backend.new_slot(2, 1, CAPACITY, 16) for _ in range(2))
    k, v = (random(2, 1, 200, 16, dtype=torch.bfloat16, seed=seed).to(kernel_device) for seed in (1, 2))
    first.write(0, k, v)
    first.length = 200
    second.share_prefix(first, 190)
    assert second.length == 190
    assert second.pages[0] is first.pages[0]  # a whole one
    assert second.pages[1] is not first.pages[1]
    assert torch.equal(second.k[:, :, :190], k[:, :, :190])
    assert torch.equal(second.v[:, :, :190], v[:, :, :190])
    second.rewind(50)
    second.own(50, 60)  # as a pass does that writes there
    assert second.pages[0] is not first.pages[0]
    assert torch.equal(second.k[:, :, :50], k[:, :, :50])
    with pytest.raises(ValueError, match="cannot share 201 positions of 200"):
        second.share_prefix(first, 201)


def test_pages_go_to_the_next_sequence(kernel_device):
    backend = CudaBackend(kernel_device, torch.bfloat16)
    first, second = (backend.new_slot(1, 1, CAPACITY, 16) for _ in range(2))
    second.length = first.length = 256
    second.share_prefix(first, 256)
    pool, shared = first.pool, first.pages[:2]
    del first
    assert [page.users for page in shared] == [1, 1]
    assert not set(shared) & set(pool._free)
    del second
    assert len(pool._free) == 6  # as many as two sequences had
    third = backend.new_slot(1, 1, 2 * CAPACITY, 16)
    assert len(third.pages) == 5
    assert len(pool._free) == 1
    pool.release()
    assert not pool._free
