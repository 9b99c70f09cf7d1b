"""Small charts as SVG: curves over the unit square, and bars."""

from collections.abc import Sequence
from html import escape

SIDE, LEFT, BELOW, ABOVE = 200, 44, 40, 22  # px
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)

Points = Sequence[tuple[float, float]]  # x and y in [0, 1]


def square(
    title: str,
    axes: tuple[str, str],
    points: Points,
    *,
    diagonal: bool = False,
    dots: bool = False,
    highest: float = 1.0,
) -> str:
    """One curve over x in [0, 1] and y in [0, highest]; `dots` marks its points, `diagonal` adds y = x dashed."""

    def place(x: float, y: float) -> str:
        return f"{LEFT + SIDE * x:.1f},{ABOVE + SIDE * (1 - y / highest):.1f}"

    width, height = LEFT + SIDE + 14, ABOVE + SIDE + BELOW
    parts = [f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>']
    for tick in TICKS:
        across, up = place(tick, 0).split(",")[0], place(0, tick * highest).split(",")[1]
        parts += [
            f'<path class="grid" d="M{across},{ABOVE}v{SIDE}M{LEFT},{up}h{SIDE}"/>',
            f'<text x="{across}" y="{ABOVE + SIDE + 15}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{LEFT - 5}" y="{float(up) + 4:.1f}" text-anchor="end">{tick * highest:.2g}</text>',
        ]
    parts += [
        f'<text x="{LEFT + SIDE / 2}" y="{height - 6}" text-anchor="middle">{escape(axes[0])}</text>',
        f'<text transform="translate(11 {ABOVE + SIDE / 2}) rotate(-90)" text-anchor="middle">{escape(axes[1])}</text>',
    ]
    if diagonal:
        parts.append(f'<path class="chance" d="M{place(0, 0)}L{place(1, 1)}"/>')
    if points:
        parts.append(f'<polyline class="curve" points="{" ".join(place(x, y) for x, y in points)}"/>')
    if dots:
        centres = (place(x, y).split(",") for x, y in points)
        parts += [f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in centres]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def bars(title: str, values: dict[str, tuple[float, float]]) -> str:
    """A bar for each name of (mean, standard deviation), shares in [0, 1]."""
    width, row = 460, 26
    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for number, (name, (mean, std)) in enumerate(values.items()):
        top, long = 24 + row * number, 220 * min(max(mean, 0.0), 1.0)
        low, high = (110 + 220 * min(max(mean + by, 0.0), 1.0) for by in (-std, std))
        parts += [
            f'<text x="104" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="bar" x="110" y="{top}" width="{long:.1f}" height="18"/>',
            f'<path class="whisker" d="M{low:.1f},{top + 9}H{high:.1f}"/>',
            f'<text x="340" y="{top + 13}">{mean:.3f} &#177; {std:.3f}</text>',
        ]
    height = 28 + row * len(values)
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="wide" {box}>{"".join(parts)}</svg>'
