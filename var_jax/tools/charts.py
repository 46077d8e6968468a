"""Line charts as inline SVG, which is sharp on every screen and needs no script."""

import dataclasses
import math
from collections.abc import Sequence

from var_jax.tools.markup import Markup, join, tag

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins
MAX_BUCKETS = 150  # of a line; each keeps its smallest and its largest value
MIN_LOG_RATIO = 30.0  # of the largest value to the smallest one, from which an axis is logarithmic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Line of a chart.

    Attributes:
      label: its name.
      points: (x, y), sorted by x; those that are not finite are left out.
      hue: color, in degrees.
      has_markers: whether points are marked.
    """

    label: str
    points: Sequence[tuple[float, float]]
    hue: int
    has_markers: bool = False


def number(value: float) -> str:
    """Format a number for people: four digits, or all digits of an integer."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def line_chart(title: str, series: Sequence[Series]) -> Markup:
    """Draw lines over the steps, with their last values in the caption; nothing without a finite point."""
    lines = [(s, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return Markup("")
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    is_log = min(ys) > 0 and max(ys) / min(ys) >= MIN_LOG_RATIO
    x_axis, y_axis = _Axis.fit(min(xs), max(xs)), _Axis.fit(min(ys), max(ys), is_log)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    place = lambda x, y: (
        LEFT + x_axis.fraction(x) * (right - LEFT),
        bottom - y_axis.fraction(y) * (bottom - TOP),
    )
    shapes: list[Markup] = []
    for y in y_axis.ticks:
        _, py = place(x_axis.low, y)
        shapes.append(tag("line", x1=LEFT, x2=right, y1=f"{py:.1f}", y2=f"{py:.1f}", class_="grid"))
        shapes.append(tag("text", _tick(y), x=LEFT - 5, y=f"{py + 4:.1f}", class_="y"))
    for x in x_axis.ticks:
        shapes.append(tag("text", _tick(x), x=f"{place(x, y_axis.low)[0]:.1f}", y=HEIGHT - 6, class_="x"))
    for s, points in lines:
        color = f"hsl({s.hue} 75% 48%)"
        pixels = [place(*p) for p in _thin(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        shapes.append(tag("polyline", points=path, stroke=color))
        if s.has_markers or len(pixels) == 1:
            shapes += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.2, fill=color) for x, y in pixels]
    svg = tag("svg", *shapes, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", **{"aria-label": title})
    keys = [
        tag("span", s.label, " ", tag("b", number(points[-1][1])), style=f"--hue:{s.hue}", class_="key")
        for s, points in lines
    ]
    caption = tag("figcaption", tag("strong", title), " (log)" if is_log else "", " ", join(keys))
    return tag("figure", caption, svg, class_="chart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    """Range of an axis and its ticks."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    @classmethod
    def fit(cls, low: float, high: float, is_log: bool = False) -> "_Axis":
        """Return an axis whose range holds `low` and `high`."""
        if is_log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1.0,) if len(decades) > 3 else (1.0, 2.0, 5.0)
            stride = -(-len(decades) // 5)
            ticks = tuple(m * 10.0**d for d in decades[::stride] for m in steps)
            return cls(low=low, high=high, is_log=True, ticks=tuple(t for t in ticks if low <= t <= high))
        if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value
            low, high = low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0)
        raw = (high - low) / 4
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low=low, high=high, is_log=False, ticks=tuple(i * step for i in range(first, last + 1)))

    def fraction(self, value: float) -> float:
        """Return the place of a value on the axis, from 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _tick(value: float) -> str:
    """Format the number at a tick."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce a long line to the extremes of its parts, and its last point, so that spikes stay visible."""
    if len(points) <= 2 * MAX_BUCKETS:
        return list(points)
    kept = []
    for i in range(MAX_BUCKETS):
        part = points[i * len(points) // MAX_BUCKETS : (i + 1) * len(points) // MAX_BUCKETS]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]
