"""Random draft trees."""

from hypothesis import strategies as st


@st.composite
def trees(draw: st.DrawFn, tokens: int, most: int = 12) -> tuple[list[int], list[int]]:
    """Token ids below `tokens` and parents of a tree; siblings are different tokens."""
    ids: list[int] = []
    parents: list[int] = []
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.integers(-1, len(ids) - 1))
        taken = {ids[i] for i, p in enumerate(parents) if p == parent}
        free = [token for token in range(tokens) if token not in taken]
        if free:
            parents.append(parent)
            ids.append(draw(st.sampled_from(free)))
    return ids, parents
