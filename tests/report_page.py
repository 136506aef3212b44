"""Reads a page of the report back: the values from where they are drawn."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """What of a page a test looks at: charts by title, texts, tags, cells of tables as (column if named,
    text)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.text = ""
        self.cells: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "td":
            self.cells.append((found.get("data-head", ""), ""))
        if tag == "svg":
            edges = {name: float(found[f"data-{name}"]) for name in ("x0", "x1", "y0", "y1")}
            _, _, width, height = map(float, found["viewbox"].split())
            self.charts.append({"title": found["aria-label"], "lines": {}, "size": (width, height), **edges})
        if tag in ("polyline", "circle", "polygon"):
            text = found.get("points") or f"{found.get('cx')},{found.get('cy')}"
            points = [tuple(map(float, point.split(","))) for point in text.split()]
            self.charts[-1]["lines"].setdefault(found["data-name"], []).extend(points)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells and self.tags[-1] == "td":
            head, text = self.cells[-1]
            self.cells[-1] = head, (text + data).strip()

    def row(self, first: str, num_cells: int = 2) -> list[str]:
        """The cells of a table's row beside its first."""
        texts = [text for _, text in self.cells]
        return texts[texts.index(first) + 1 :][:num_cells]

    def heights(self, title: str, name: str) -> list[tuple[float, float]]:
        """x and height of an area, whose outline is the upper edge and the lower edge backwards."""
        outline = self.values(title, name)
        upper, lower = outline[: len(outline) // 2], outline[: len(outline) // 2 - 1 : -1]
        assert [x for x, _ in upper] == [x for x, _ in lower]
        return [(x, top - bottom) for (x, top), (_, bottom) in zip(upper, lower, strict=True)]

    def values(self, title: str, name: str) -> list[tuple[float, float]]:
        """The points of a line, read back from where they are drawn."""
        (chart,) = (chart for chart in self.charts if chart["title"].startswith(f"{title}, by"))
        width, height = chart["size"]
        left, right, top, bottom = 64, 14, 12, 40
        across, up = chart["x1"] - chart["x0"], chart["y1"] - chart["y0"]
        return [
            (
                chart["x0"] + (x - left) / (width - left - right) * across,
                chart["y0"] + (height - bottom - y) / (height - top - bottom) * up,
            )
            for x, y in chart["lines"][name]
        ]
