"""The one acceptance rule: a draft is kept while it equals the target's own token."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def accept(own: Callable[[int], int], tokens: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Walks a draft tree (chain: parents -1, 0, 1, ...) along the target's own tokens.

    own(row): the target's own token after candidate `row`, -1 for the last committed token; asked for row by row, as
    each becomes certain. Returns the tokens to commit, 1 to drafted + 1, and the accepted candidates.
    """
    committed, path, at = [own(-1)], [], -1
    for row, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == at and token == committed[-1]:
            path.append(row)
            at = row
            committed.append(own(row))
    return committed, path
