"""Positions of a workflow's nodes and groups: check overlaps, and lay nodes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

TITLE = 30
"""Height of a node's title, which is above its `pos`, in pixels."""
HEAD = 50
"""Pixels from a group's top to its first node's title."""
EDGE, GAP = 20, 40
"""Pixels between a group's border and its nodes or the next group, and between nodes of a column."""


def overlaps(boxes: dict[str, Box], groups: dict[str, Box], members: dict[str, str]) -> list[str]:
    """Overlapping nodes, and nodes outside their group. members: the group of a node, by the node's name."""
    found = [f"{a} lies over {b}" for a, b in combinations(boxes, 2) if _cross(boxes[a], boxes[b])]
    found += [f"groups {a} and {b} cross" for a, b in combinations(groups, 2) if _cross(groups[a], groups[b])]
    for name, box in boxes.items():
        for title, group in groups.items():
            if members.get(name) == title and not _inside(box, group):
                found.append(f"{name} leaves {title}")
            elif members.get(name) != title and _cross(box, group):
                found.append(f"{name} lies over {title}, which is not its group")
    return found


def groups_of(workflow: dict[str, Any]) -> dict[str, Box]:
    return {group["title"]: _box(*group["bounding"]) for group in workflow["groups"]}


def members_of(workflow: dict[str, Any]) -> dict[str, str]:
    """The group around a node, by the node's number."""
    groups = groups_of(workflow).items()
    return {
        str(node["id"]): title
        for node in workflow["nodes"]
        for title, group in groups
        if _inside((*node["pos"], *node["pos"]), group)
    }


def lay_out(workflow: dict[str, Any], drawn: Iterable[dict[str, Box]]) -> None:
    """Give nodes the size they are drawn with, keeping columns and the order within them.

    seen: the nodes' boxes, drawn several times.
    """
    members, nodes = members_of(workflow), {str(node["id"]): node for node in workflow["nodes"]}
    sizes = {name: (node["size"][0], node["size"][1] + TITLE) for name, node in nodes.items()}
    for name, (left, top, right, bottom) in (one for boxes in drawn for one in boxes.items()):
        sizes[name] = (max(sizes[name][0], ceil(right - left)), max(sizes[name][1], ceil(bottom - top)))
    parts = [
        _Part({n: node for n, node in nodes.items() if members.get(n) == group["title"]}, group)
        for group in workflow["groups"]
    ] + [_Part({n: node}) for n, node in nodes.items() if n not in members]
    before = [part.box() for part in parts]
    taken = [part.stack(sizes) for part in parts]
    corners = [[round(value) for value in box[:2]] for box in before]
    for axis in (0, 1):
        for i in sorted(range(len(parts)), key=lambda i: before[i][axis]):
            ahead = [
                corners[j][axis] + taken[j][axis] + EDGE
                for j, box in enumerate(before)
                if box[axis + 2] <= before[i][axis] + TITLE
                and (axis == 0 or (box[0] < before[i][2] and before[i][0] < box[2]))
            ]
            corners[i][axis] = max(ahead, default=corners[i][axis])
    for part, corner, size in zip(parts, corners, taken, strict=True):
        part.move(corner, size)


@dataclass
class _Part:
    """The nodes of a group, or a single node without group."""

    nodes: dict[str, Any]
    group: dict[str, Any] | None = None

    def box(self) -> Box:
        if self.group is not None:
            return _box(*self.group["bounding"])
        (node,) = self.nodes.values()
        return _box(node["pos"][0], node["pos"][1] - TITLE, node["size"][0], node["size"][1] + TITLE)

    def stack(self, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
        """Arrange the nodes in columns from a corner at 0, 0 and return the size."""
        edge, head = (EDGE, HEAD) if self.group is not None else (0, 0)
        x, bottom = edge, 0
        for column in _columns(self.nodes):
            y = head
            for name, node in column:
                node["pos"] = [x, y + TITLE]
                y += sizes[name][1] + GAP
            x += max(sizes[name][0] for name, _ in column) + GAP
            bottom = max(bottom, y - GAP)
        return x - GAP + edge, bottom + edge

    def move(self, corner: list[int], size: tuple[int, int]) -> None:
        x, y = corner
        for node in self.nodes.values():
            node["pos"] = [node["pos"][0] + x, node["pos"][1] + y]
        if self.group is not None:
            self.group["bounding"] = [x, y, *size]


def _columns(nodes: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    """Columns of nodes from left to right, each sorted from top to bottom."""
    lefts = sorted({node["pos"][0] for node in nodes.values()})
    return [
        sorted(((n, node) for n, node in nodes.items() if node["pos"][0] == left), key=lambda one: one[1]["pos"][1])
        for left in lefts
    ]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x, y, x + width, y + height


def _cross(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: Box, b: Box) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]
