"""Allocation of sparsity between layers: more where it costs little, at the same bytes in all. Needs no torch.

Every layer has a curve, what its sparsity costs at each of `LEVELS`. The sum of the costs is least, at a given number
of bytes, where all layers stand at the same slope of their curves; on the lower convex hulls, piece by piece from the
least slope on, that is reached exactly. TEAL (arXiv 2408.14690) goes in small steps between the inputs of one block by
the error of the block; here it is between the layers of a model. Curves are measured near one operating point, so that
no layer goes farther than `SPREAD` from the target.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Sparsities at which the cost of a layer is measured; 0 costs nothing."""
SPREAD = 0.2
"""How far the level of a layer may be from the target."""
Point = tuple[float, float]


def allocate(
    costs: Mapping[str, Sequence[float]],
    sizes: Mapping[str, float],
    target: float,
    levels: Sequence[float] = LEVELS,
    spread: float = SPREAD,
) -> dict[str, float]:
    """Level of every layer with the least sum of costs whose mean, weighted by ``sizes``, is ``target``.

    Args:
        costs: layer to what it costs at each of ``levels``, straight between them.
        sizes: layer to its bytes, or what is proportional to them; positive.
        target: sparsity of the whole, in [0, 1).
        levels: ascending, in (0, 1); none is exceeded, unless ``target`` does, which then is the level of all.
        spread: bound of the distance from ``target``.
    """
    lowest, highest = max(0.0, target - spread), min(target + spread, levels[-1])
    if target >= highest:
        return dict.fromkeys(costs, target)
    grid = [lowest, *(level for level in levels if lowest < level < highest), highest]
    pieces = [
        ((end[1] - start[1]) / (end[0] - start[0]) / sizes[name], start[0], end[0], name)
        for name, own in costs.items()
        for start, end in _edges([(x, float(np.interp(x, (0.0, *levels), (0.0, *own)))) for x in grid])
    ]
    allocated = dict.fromkeys(costs, lowest)
    left = (target - lowest) * sum(sizes[name] for name in costs)
    for _slope, start, end, name in sorted(pieces, key=lambda piece: piece[0]):  # stable: a layer's stay in order
        step = min(end - start, left / sizes[name])
        allocated[name] = start + step
        left -= step * sizes[name]
        if step < end - start:
            break
    return allocated


def _edges(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Edges of the lower convex hull of ``points``, which ascend in their first number; their slopes ascend."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return list(pairwise(hull))


def _above(start: Point, middle: Point, end: Point) -> bool:
    """Whether ``middle`` lies on or above the line from ``start`` to ``end``."""
    return (middle[1] - start[1]) * (end[0] - start[0]) >= (end[1] - start[1]) * (middle[0] - start[0])
