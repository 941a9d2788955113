"""Draw docs/architecture.svg, the folders of the code as layers, and fill in which file holds what.

    python docs/architecture.py

A box is a folder or a file directly under sdgraph/ or a folder under exporters/, with the first sentence of its
docstring; passes/ is one box. A box stands above everything that it imports. An arrow that follows from others is left
out; a dashed one is an import that happens inside functions only. Boxes that import each other in a circle are one.
"""

from __future__ import annotations

import ast
import re
import textwrap
from html import escape
from pathlib import Path
from statistics import mean

import networkx as nx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FIGURE = DOCS / "architecture.svg"
TREES = {"sdgraph": "sdgraph", "passes": "sdgraph.passes", "exporters": "sdgraph.exporters"}
FACADE = "sdgraph/__init__.py"  # the public names, which passes and exporters use; they are loaded from public.py
WIDTH, GAP, ACROSS = 176, 14, 6  # of a box; between boxes; boxes side by side
RISE = 46  # between rows

PAGE = DOCS / "architecture.md"
PLACE = re.compile(r"`(\w+)` in\s`([\w/.]+\.py)`")  # in the page: a name of the code, and the file that defines it


def modules() -> dict[str, Path]:
    """Every module by the name under which it is imported."""
    found = {}
    for folder, package in TREES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            if parts != ("__main__",):
                found[name] = path
    return found


def group(path: Path) -> str:
    """The box that a file belongs to, as a path from the root of the repository."""
    folder, *rest = path.relative_to(ROOT).parts
    if folder == "passes" or rest in (["__init__.py"], ["public.py"]):
        return FACADE if folder == "sdgraph" else folder
    return f"{folder}/{rest[0]}" if folder == "sdgraph" or len(rest) > 1 else folder


def imports(name: str, path: Path, known: dict[str, Path]) -> dict[str, bool]:
    """The modules that a module imports; whether it does so when it is itself imported."""
    found: dict[str, bool] = {}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
            if package != "sdgraph" and base == "sdgraph":  # `from sdgraph import apply` is a public name, not a file
                targets = [base if node.level == 0 and target in known else target for target in targets]
        for target in targets:
            if target in known:
                found[target] = found.get(target, False) or at_once
        inner = at_once and not isinstance(node, ast.FunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text()), True)
    return found


def graph() -> nx.DiGraph:
    """Boxes and imports; `at_once` is false where all imports are inside functions."""
    known, boxes = modules(), nx.DiGraph()
    for name, path in known.items():
        boxes.add_node(group(path))
        for target, at_once in imports(name, path, known).items():
            edge = group(path), group(known[target])
            if edge[0] != edge[1]:
                at_once = at_once or boxes.get_edge_data(*edge, {"at_once": False})["at_once"]
                boxes.add_edge(*edge, at_once=at_once)
    return boxes


def sentence(box: str) -> str:
    """What a folder or file says that it is."""
    path = ROOT / box
    path = path / "__init__.py" if path.is_dir() else path
    text = "The public names." if box == FACADE else ast.get_docstring(ast.parse(path.read_text())) or ""
    text = re.sub(r"^`\w+`: ", "", " ".join(text.partition("\n\n")[0].split()))
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(".:")


def rows(order: nx.DiGraph) -> list[list[int]]:
    """The layers from the top, none wider than the page; neighbours stand where their importers do."""
    depth: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(order))):
        depth[node] = 1 + max((depth[below] for below in order.successors(node)), default=-1)
    column: dict[int, float] = {}
    laid = []
    for level in range(max(depth.values()), -1, -1):
        layer = [node for node in order if depth[node] == level]
        keys = [(mean([column[n] for n in order.predecessors(node)] or [0.5]), node) for node in layer]
        layer = [node for _, node in sorted(keys)]
        count = -(-len(layer) // ACROSS)
        for i in range(count):
            row = layer[i::count]
            column |= {node: (j + 0.5) / len(row) for j, node in enumerate(row)}
            laid.append(row)
    return laid


def draw(boxes: nx.DiGraph) -> str:
    """The figure as SVG."""
    order = nx.condensation(boxes)
    shown = nx.transitive_reduction(order)
    place: dict[int, tuple[float, float, float, float]] = {}
    layers, y = rows(nx.DiGraph(order)), GAP
    page = max(map(len, layers)) * (WIDTH + GAP) + GAP
    parts: list[str] = []
    for row in layers:
        lines = {node: content(sorted(order.nodes[node]["members"])) for node in row}
        height = max(12 + 14 * len(text) for text in lines.values())
        total = len(row) * (WIDTH + GAP) - GAP
        for j, node in enumerate(row):
            x = (page - total) / 2 + j * (WIDTH + GAP)
            place[node] = x, y, WIDTH, height
            circle = len(order.nodes[node]["members"]) > 1
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height}" rx="4" '
                f'fill="{"#fdeceb" if circle else "#f3f5f7"}" stroke="{"#b3423a" if circle else "#5c6b77"}"/>'
            )
            for k, (text, bold) in enumerate(lines[node]):
                style = 'font-weight="bold" font-size="12"' if bold else 'font-size="10.5" fill="#444"'
                parts.append(f'<text x="{x + 8:g}" y="{y + 18 + 14 * k:g}" {style}>{escape(text)}</text>')
        y += height + RISE
    arrows = [arrow(place[a], place[b], at_once(boxes, order, a, b)) for a, b in sorted(shown.edges)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page} {y - RISE + GAP:g}" '
        'font-family="Roboto, Helvetica, Arial, sans-serif">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#78909c"/></marker></defs>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join([*arrows, *parts]) + "\n</svg>\n"
    )


def content(members: list[str]) -> list[tuple[str, bool]]:
    """The lines of a box, and whether they are bold."""
    if len(members) > 1:
        names = textwrap.wrap(", ".join(member.rpartition("/")[2] for member in members), 25)
        return [("import each other in a circle:", False), *((name, True) for name in names)]
    (box,) = members
    title = "sdgraph" if box == FACADE else box.removeprefix("sdgraph/") if box.endswith(".py") else f"{box}/"
    return [(title, True), *((line, False) for line in textwrap.wrap(sentence(box), 29)[:3])]


def at_once(boxes: nx.DiGraph, order: nx.DiGraph, a: int, b: int) -> bool:
    """Whether one box needs the other as soon as it is imported."""
    pairs = nx.edge_boundary(boxes, order.nodes[a]["members"], order.nodes[b]["members"], data="at_once")
    return any(now for _, _, now in pairs)


def arrow(above: tuple[float, ...], below: tuple[float, ...], solid: bool) -> str:
    (x, y, width, height), (u, v, across, _) = above, below
    # a little apart where boxes stand beside each other, so that arrows into one box can be told apart
    start, end = x + width / 2, u + across / 2 + (x - u) / 40
    bottom = y + height
    bend = (v - bottom) / 2
    dash = "" if solid else ' stroke-dasharray="4 3"'
    return (
        f'<path d="M{start:g} {bottom:g}C{start:g} {bottom + bend:g} {end:g} {v - bend:g} {end:g} {v:g}" fill="none" '
        f'stroke="#78909c" stroke-width="1.3"{dash} marker-end="url(#tip)"/>'
    )


def page() -> str:
    """docs/architecture.md with the files that define what it names."""
    defined = {
        path: {getattr(node, "name", "") for node in ast.parse(path.read_text()).body} for path in modules().values()
    }

    def found(place: re.Match[str]) -> str:
        files = [path for path, names in defined.items() if place[1] in names]
        if len(files) != 1:
            raise SystemExit(f"docs/architecture.md names {place[1]}, which {len(files)} files define")
        return place[0].replace(place[2], files[0].relative_to(ROOT).as_posix())

    return PLACE.sub(found, PAGE.read_text())


def main() -> None:
    FIGURE.write_text(draw(graph()))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
