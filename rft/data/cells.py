"""Parts of a picture that was encoded: its pooled map, and a region of it out of the same encoding (VGR, arXiv:2506.11991).

A cell is what one placeholder token of the full encoding stands for, `unit` x `unit` pixels of it. A view shows all cells,
or those of a region, or means over `pool` x `pool` of them; a ragged edge is the mean of what is there. Of a video every
pair is treated alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rft import geometry
from rft.errors import DataError
from rft.families import Family
from rft.types import Box, View

Region = tuple[int, int, int, int]  # first row, first column, row and column behind the last, in cells

TIE = 1e-6  # cells: an edge that rounding puts this far beyond a cell's stays on it


def whole(view: View, family: Family) -> View:
    """What the vision tower encodes for a view: all cells, unpooled; the view itself where nothing is pooled or gathered.

    Views with the same whole have the same pixels in the frame store and the same features in the vision memory.
    """
    if view.pool == 1 and view.region is None:
        return view
    grid = family.grid(len(view.frames), view.size)
    return replace(view, grid=grid, tokens=family.tokens(grid), pool=1, region=None)


def cells(view: View, family: Family) -> tuple[int, int]:
    """(rows, columns) of cells of the full encoding."""
    return view.size[0] // family.unit, view.size[1] // family.unit


def part(view: View, family: Family, *, pool: int = 1, region: Region | None = None, max_tokens: int | None = None) -> View:
    """Of what was encoded for `view`: these cells, in means over `pool` x `pool`, over more where `max_tokens` asks for it.

    Raises DataError when even one token per pair is too many.
    """
    full = whole(view, family)
    limit = math.inf if max_tokens is None else max_tokens
    r0, c0, r1, c1 = region or (0, 0, *cells(view, family))
    while True:
        rows, columns = -(-(r1 - r0) // pool), -(-(c1 - c0) // pool)
        grid = (full.grid[0], rows * family.merge, columns * family.merge)
        tokens = family.tokens(grid)
        if tokens <= limit or rows == columns == 1:
            break
        pool += 1
    if tokens > limit:
        name = view.source if isinstance(view.source, str) else view.source[0]
        what = f"{tokens} pairs take a token each, max_tokens is {max_tokens}"
        raise DataError(name, what, "raise max_tokens or show fewer frames")
    return replace(full, grid=grid, tokens=tokens, pool=pool, region=region)


def covering(box: Box, view: View, family: Family) -> Region:
    """The cells of what was encoded for `view` that a box in pixels of the file touches, at least one.

    The box has an area and meets the picture; what reaches out is cut.
    """
    rows, columns = cells(view, family)
    x0, y0, x1, y1 = geometry.carried(box, picture(view), (0, 0, columns, rows))
    r0, c0 = min(math.floor(y0 + TIE), rows - 1), min(math.floor(x0 + TIE), columns - 1)
    return (r0, c0, max(math.ceil(y1 - TIE), r0 + 1), max(math.ceil(x1 - TIE), c0 + 1))


def picture(view: View) -> Box:
    """What was encoded, in pixels of the file."""
    return view.crop or (0, 0, view.original[1], view.original[0])


def shown(view: View, family: Family) -> Box:
    """What the view shows of it, in pixels of the file: the cells that were gathered."""
    if view.region is None:
        return picture(view)
    (r0, c0, r1, c1), (rows, columns) = view.region, cells(view, family)
    return geometry.carried((c0, r0, c1, r1), (0, 0, columns, rows), picture(view))


def extent(view: View, family: Family) -> tuple[int, int]:
    """(x, y) of the lower right corner of what is shown, in the coordinates of the model's boxes.

    Where those are pixels, they are pixels of the full encoding, of a pooled view too.
    """
    if view.region is None:
        return family.box_extent(view.size)
    r0, c0, r1, c1 = view.region
    return family.box_extent(((r1 - r0) * family.unit, (c1 - c0) * family.unit))
