"""The drawing of docs/architecture.md, made from the imports: `make drawing`.

    python -m tests.architecture     writes docs/architecture.svg

A box is a folder of a package, or a door: a file beside the folders through which another package
comes in. An arrow goes from a box to one that it imports, by itself or through files without a box.
An arrow that longer ways imply is left out, and boxes with the same arrows are one box. So the
drawing changes when the order of the rooms changes, and not with every edit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from xml.sax.saxutils import escape

from tests.imports import GRAPH, ROOT

DRAWING = ROOT / "docs" / "architecture.svg"
# from left to right, so that few arrows cross a column
COLUMNS = ("loaders", "jaxwna16", "pallas_kernels")
WIDTH, COLUMN, GAP = 840, 260, 20
ROW, BOX, TITLE, CORNER = 62, 30, 44, 8
# a monospace letter is 0.6 of its 14 pixels wide, with some room
LETTER = 8.5
LEGEND = (
    "A box is a folder, or a file through",
    "which another package comes in.",
    "An arrow leads to what is imported.",
    "It is left out where a longer way",
    "leads there, too.",
)
STYLE = """
  .sheet { fill: #ffffff; stroke: #d0d7de; }
  .loaders { fill: #fdf0dc; } .jaxwna16 { fill: #e3eefc; } .pallas_kernels { fill: #e0f3e6; }
  .box { fill: #ffffff; stroke: #57606a; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.5; marker-end: url(#head); }
  text { fill: #1f2328; font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
  .box-name { text-anchor: middle; }
  .title { font-weight: 600; }
  .legend { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
"""

Graph = Mapping[str, Collection[str]]
Group = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Box:
    """Rooms, "package.room" each, and where they are drawn.

    Attributes:
      row: 0 at the top.
      x: the middle, in pixels.
    """

    rooms: Group
    row: int
    x: float

    @property
    def label(self) -> str:
        """The names of the rooms as files and folders."""
        names = [room.partition(".")[2] for room in self.rooms]
        pairs = zip(names, self.rooms, strict=True)
        return "  ".join(f"{name}/" if is_wing(room) else f"{name}.py" for name, room in pairs)

    @property
    def width(self) -> float:
        return len(self.label) * LETTER + 12

    @property
    def top(self) -> float:
        return GAP + TITLE + self.row * ROW


def find_package(room: str) -> str:
    """The package of a module or room."""
    return room.partition(".")[0]


def is_wing(room: str) -> bool:
    """Whether a room is a folder."""
    return "." in room and (ROOT / room.replace(".", "/")).is_dir()


def join_rooms(graph: Graph) -> dict[str, set[str]]:
    """Each room -> those that its modules import."""
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        room = _find_room(module)
        rooms.setdefault(room, set()).update({_find_room(other) for other in imported} - {room})
    return rooms


def _find_room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def list_ways(graph: Graph) -> dict[str, set[str]]:
    """Each node of a graph without circles -> all to which arrows lead, one after the other."""
    ways: dict[str, set[str]] = {}

    def visit(node: str) -> set[str]:
        if node not in ways:
            ways[node] = set(graph[node]).union(*map(visit, graph[node]))
        return ways[node]

    return {node: visit(node) for node in graph}


def choose_rooms(rooms: Graph) -> set[str]:
    """The rooms that get a box: folders and doors."""
    ways = list_ways(rooms)
    wings = {room for room in rooms if is_wing(room)}

    def is_door(room: str) -> bool:
        package = find_package(room)
        leads_in = any(find_package(wing) == package for wing in ways[room] & wings)
        users = {find_package(other) for other, ends in rooms.items() if room in ends}
        return "." in room and leads_in and bool(users - {package})

    return wings | {room for room in rooms if is_door(room)}


def choose_arrows(rooms: Graph, chosen: Collection[str]) -> dict[str, set[str]]:
    """The fewest arrows between chosen rooms that lead wherever imports do."""
    ways = {room: ends & {*chosen} for room, ends in list_ways(rooms).items() if room in chosen}
    return {room: ends - set().union(*(ways[end] for end in ends)) for room, ends in ways.items()}


def join_twins(arrows: Graph) -> dict[Group, set[Group]]:
    """Arrows between groups of rooms: those of one package with all arrows in common are one."""
    groups: dict[object, list[str]] = {}
    for room in sorted(arrows):
        sources = frozenset(other for other, ends in arrows.items() if room in ends)
        groups.setdefault((find_package(room), sources, frozenset(arrows[room])), []).append(room)
    group_of = {room: tuple(group) for group in groups.values() for room in group}
    return {tuple(group): {group_of[end] for end in arrows[group[0]]} for group in groups.values()}


def find_rows(arrows: Mapping[Group, Collection[Group]]) -> dict[Group, int]:
    """Each group -> its row, below all that have an arrow to it."""
    rows = dict.fromkeys(arrows, 0)
    for _ in arrows:  # no way is longer
        for group, ends in arrows.items():
            rows |= {end: max(rows[end], rows[group] + 1) for end in ends}
    return rows


def place_boxes(arrows: Mapping[Group, Collection[Group]]) -> Iterator[Box]:
    """A column for each package. Boxes of one row stand beside each other within it."""
    rows = find_rows(arrows)

    def find_cell(group: Group) -> tuple[int, int]:
        return rows[group], COLUMNS.index(find_package(group[0]))

    def lean(group: Group) -> tuple[float, int]:
        """Towards the columns that arrows go to; on the left, the longest arrow is outside."""
        cells = [find_cell(end) for end in arrows[group]]
        middle = sum(column for _, column in cells) / max(1, len(cells))
        return middle, -max((row for row, _ in cells), default=0)

    for cell, found in itertools.groupby(sorted(arrows, key=find_cell), key=find_cell):
        groups = sorted(found, key=lean)
        for place, group in enumerate(groups):
            share = COLUMN * (place + 0.5) / len(groups)
            yield Box(group, cell[0], GAP + cell[1] * (COLUMN + GAP / 2) + share)


def is_free(x: float, source: Box, end: Box, boxes: Collection[Box]) -> bool:
    """Whether a line straight down from one row to the other passes no box."""
    passed = [box for box in boxes if source.row < box.row < end.row]
    return all(abs(box.x - x) > box.width / 2 for box in passed)


def lay_out(graph: Graph) -> tuple[list[Box], list[tuple[Box, Box]]]:
    """The boxes of an import graph, and the arrows between them."""
    rooms = join_rooms(graph)
    arrows = join_twins(choose_arrows(rooms, choose_rooms(rooms)))
    boxes = {box.rooms: box for box in place_boxes(arrows)}
    return list(boxes.values()), [
        (boxes[group], boxes[end]) for group in boxes for end in sorted(arrows[group])
    ]


def draw(graph: Graph = GRAPH) -> str:
    """The drawing of an import graph, as the text of an SVG."""
    boxes, arrows = lay_out(graph)
    height = max(box.top for box in boxes) + BOX + 2 * GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
        "<title>The folders of jaxwna16 and the imports between them</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="#57606a"/>'
        "</marker>",
        _draw_rectangle("sheet", 0.5, 0.5, WIDTH - 1, height - 1),
        *(line for package in COLUMNS for line in _draw_package(package, boxes)),
        *(_draw_arrow(*arrow, is_free(arrow[0].x, *arrow, boxes)) for arrow in arrows),
        *(line for box in boxes for line in _draw_box(box)),
        *(_draw_text("legend", GAP, 2 * GAP + 20 * i, text) for i, text in enumerate(LEGEND)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _draw_rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" {size} rx="{CORNER}"/>'


def _draw_text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" xml:space="preserve">{escape(text)}</text>'


def _draw_package(package: str, boxes: Collection[Box]) -> list[str]:
    """The ground of a package's boxes, and its name."""
    own = [box for box in boxes if find_package(box.rooms[0]) == package]
    x = GAP + COLUMNS.index(package) * (COLUMN + GAP / 2)
    top = min(box.top for box in own) - TITLE
    height = max(box.top for box in own) + BOX + GAP / 2 - top
    return [
        _draw_rectangle(package, x, top, COLUMN, height),
        _draw_text("title", x + GAP / 2, top + 18, f"{package}/"),
    ]


def _draw_box(box: Box) -> list[str]:
    return [
        _draw_rectangle("box", box.x - box.width / 2, box.top, box.width, BOX),
        _draw_text("box-name", box.x, box.top + BOX / 2 + 5, box.label),
    ]


def _draw_arrow(source: Box, end: Box, is_late: bool) -> str:
    """Down, across in the gap above the end's row (if not late: below the source's), and down."""
    start, stop, gap = source.top + BOX, end.top, (ROW - BOX) / 2
    turn = stop - gap if is_late else start + gap
    if source.x == end.x:
        return f'<path class="arrow" d="M{source.x:g} {start:g}V{stop:g}"/>'
    side = CORNER if end.x > source.x else -CORNER
    return (
        f'<path class="arrow" d="M{source.x:g} {start:g}V{turn - CORNER:g}'
        f"q0 {CORNER} {side} {CORNER}H{end.x - side:g}"
        f'q{side} 0 {side} {CORNER}V{stop:g}"/>'
    )


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
