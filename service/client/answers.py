"""Answers as the service gives them, which notebooks and terminals show as tables."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from service.report.attention import Drawing, attention_curves
from service.schemas import predictions, search

Row = Sequence[str]


class Explained(predictions.Explanation):
    """What prediction and attention share: the slices behind an answer."""

    def __repr__(self) -> str:
        tables = ("\n".join(_aligned(header, rows)) for header, rows in self._tables())
        return "\n".join((f"<{self._title()}>", *tables, self._shares()))

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        tables = "".join(_html(header, rows) for header, rows in self._tables())
        return f"<p>{escape(self._title())}</p>{tables}<p>{escape(self._shares())}</p>"

    def _title(self) -> str:
        named = f"{self.head_name}@{self.head_version} ({self.head_id})"
        return f"head {self.head_id if self.head_name == self.head_id else named}"

    def _tables(self) -> Iterator[tuple[Row, list[Row]]]:
        yield (
            ("top slice", "z mm", "attention", "series"),
            [
                (str(each.slice), f"{each.z_mm:.1f}", _spread(each.weight, each.weight_std), each.series_uid)
                for each in self.top_slices
            ],
        )

    def _shares(self) -> str:
        return "attention by window: " + ", ".join(f"{name} {share:.2f}" for name, share in self.window_share.items())


class Predictions(Explained, predictions.Predictions):
    """A patient's probabilities, one per label."""

    def _title(self) -> str:
        return f"Predictions for {self.patient_id} by {super()._title()}, {len(self.series)} series"

    def _tables(self) -> Iterator[tuple[Row, list[Row]]]:
        spreads = self.probabilities_std
        yield (
            ("label", "probability"),
            [(label, _spread(value, spreads[label])) for label, value in self.probabilities.items()],
        )
        yield from super()._tables()


class Attention(Explained, predictions.Attention):
    """A head's weight of every slice at every window of a series."""

    def _title(self) -> str:
        return f"Attention of {super()._title()} over {len(self.instances)} instances of {self.series_uid}"

    def plot(self) -> Drawing:
        """Curves over the body, one per window, with the key slices marked."""
        return attention_curves(self)


class SearchAnswer(search.SearchAnswer):
    """The nearest slices, and how they were found."""

    def __repr__(self) -> str:
        return "\n".join((f"<{self._title()}>", *_aligned(*self._table())))

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{_html(*self._table())}"

    def _title(self) -> str:
        return f"{len(self.hits)} similar slices by {self.encoder_id}, index {self.index}, recall {self.recall:.2f}"

    def _table(self) -> tuple[Row, list[Row]]:
        header = ("cosine", "slice", "z mm", "window", "patient", "series")
        rows: list[Row] = [
            (f"{hit.score:.4f}", str(hit.slice), f"{hit.z_mm:.1f}", hit.window, hit.patient_id, hit.series_uid)
            for hit in self.hits
        ]
        return header, rows


def _spread(mean: float, std: float) -> str:
    return f"{mean:.3f} ± {std:.3f}"


def _aligned(header: Row, rows: Iterable[Row]) -> Iterator[str]:
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _html(header: Row, rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
