"""A head's attention along the body as SVG, as in the paper's Figure 4: a curve per window, key slices marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from service.schemas.predictions import Attention

WIDTH, HEIGHT, LEFT, RIGHT, ABOVE, BELOW = 640, 220, 56, 110, 28, 44  # px
TICKS = 5
COLOURS = ("#0b5fa5", "#c2571a", "#2f7d4f", "#7a3e9d", "#8a6d00", "#5a6673")
STYLE = (
    "text { font: 11px system-ui, sans-serif; fill: #55606e; } .title { font-weight: 600; fill: #1b2430; } "
    ".grid { stroke: #e6eaef; } .key { stroke: #7d8896; stroke-dasharray: 3 3; } "
    "polyline { fill: none; stroke-width: 2; }"
)


@dataclass(frozen=True)
class Drawing:
    """An SVG that notebooks show by themselves."""

    svg: str

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing, {len(self.svg)} characters of SVG; save(path) writes them>"


def attention_curves(attention: Attention) -> Drawing:
    """Weight of every slice over z, a curve per window; the key slices as dashed lines with their numbers."""
    places = [each.z_mm for each in attention.instances]
    axis = _Axis(min(places), max(places), max(each.weight for each in attention.instances) or 1.0)
    title = f"Attention of head {attention.head_id}"
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', *_frame(axis)]
    for each in attention.key_slices:
        across = axis.across(each.z_mm)
        label = f"slice {each.slice}, z {each.z_mm:.1f} mm, weight {each.weight:.3f}"
        parts.append(
            f'<path class="key" d="M{across:.1f},{ABOVE}v{HEIGHT}"><title>{escape(label)}</title></path>'
            f'<text x="{across:.1f}" y="{ABOVE - 3}" text-anchor="middle">{each.slice}</text>'
        )
    for number, window in enumerate(attention.window_share):
        points = sorted((each.z_mm, each.weight) for each in attention.instances if each.window == window)
        parts += _curve(axis, points, window, number)
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{ABOVE + HEIGHT + BELOW}"'
    box = f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {ABOVE + HEIGHT + BELOW}" role="img" aria-label="{escape(title)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}><style>{STYLE}</style>'
    return Drawing(f"{start}{''.join(parts)}</svg>\n")


@dataclass(frozen=True)
class _Axis:
    low_mm: float
    high_mm: float
    highest: float  # weight

    def across(self, z_mm: float) -> float:
        length = self.high_mm - self.low_mm
        return LEFT + WIDTH * ((z_mm - self.low_mm) / length if length else 0.5)

    def up(self, weight: float) -> float:
        return ABOVE + HEIGHT * (1 - weight / self.highest)


def _frame(axis: _Axis) -> Iterator[str]:
    for k in range(TICKS):
        share = k / (TICKS - 1)
        z_mm = axis.low_mm + share * (axis.high_mm - axis.low_mm)
        across, up = LEFT + WIDTH * share, axis.up(axis.highest * share)
        yield f'<path class="grid" d="M{across:.1f},{ABOVE}v{HEIGHT}M{LEFT},{up:.1f}h{WIDTH}"/>'
        yield f'<text x="{across:.1f}" y="{ABOVE + HEIGHT + 15}" text-anchor="middle">{z_mm:.0f}</text>'
        yield f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{axis.highest * share:.2g}</text>'
    yield f'<text x="{LEFT + WIDTH / 2}" y="{ABOVE + HEIGHT + 34}" text-anchor="middle">z, mm, from feet to head</text>'
    middle = ABOVE + HEIGHT / 2
    yield f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">attention</text>'


def _curve(axis: _Axis, points: Sequence[tuple[float, float]], window: str, number: int) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    placed = [(axis.across(z_mm), axis.up(weight)) for z_mm, weight in points]
    yield f'<polyline stroke="{colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>'
    if len(placed) == 1:
        yield f'<circle cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3" fill="{colour}"/>'
    down = ABOVE + 12 + 18 * number
    yield f'<path d="M{LEFT + WIDTH + 12},{down - 4}h18" stroke="{colour}" stroke-width="2"/>'
    yield f'<text x="{LEFT + WIDTH + 36}" y="{down}">{escape(window)}</text>'
