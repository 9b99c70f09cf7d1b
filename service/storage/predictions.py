"""SQL: which predictions were given, so that each can be given again."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from service.errors import PredictionNotFound, SeriesNotFound
from service.storage.database import Database
from service.storage.keys import EmbeddingKey
from service.storage.tables import HeadRow, PredictionBagRow, PredictionRow, SeriesRow

ID_DIGITS = 24  # hex, of SHA-256


class Predictions:
    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, head_id: str, bags: Mapping[str, str], asked: dict[str, Any]) -> str:
        """The id of a prediction by this head of these bags, content by series UID; asked again it is the same."""
        said = json.dumps([head_id, sorted(bags.items()), asked], sort_keys=True)
        prediction_id = hashlib.sha256(said.encode()).hexdigest()[:ID_DIGITS]
        if not self._known(prediction_id):
            try:
                self._add(prediction_id, head_id, bags, asked)
            except IntegrityError:
                if not self._known(prediction_id):  # else another request noted it at the same moment
                    raise
        return prediction_id

    def get(self, prediction_id: str) -> PredictionRow:
        with self._database.read() as session:
            row = session.get(PredictionRow, prediction_id)
        if row is None:
            raise PredictionNotFound(f"no prediction {prediction_id}")
        return row

    def contents(self, key: EmbeddingKey) -> set[str]:
        """Of this embedding's bags, those that predictions were made of."""
        query = (
            select(PredictionBagRow.content)
            .join(PredictionRow, PredictionRow.prediction_id == PredictionBagRow.prediction_id)
            .join(HeadRow, HeadRow.head_id == PredictionRow.head_id)
            .where(PredictionBagRow.series_uid == key.series_uid, HeadRow.encoder_id == key.encoder_id)
        )
        with self._database.read() as session:
            return {*session.scalars(query)}

    def _known(self, prediction_id: str) -> bool:
        with self._database.read() as session:
            return session.get(PredictionRow, prediction_id) is not None

    def _add(self, prediction_id: str, head_id: str, bags: Mapping[str, str], asked: dict[str, Any]) -> None:
        with self._database.write() as session:
            series = list(
                session.scalars(select(SeriesRow).where(SeriesRow.series_uid.in_(bags)).with_for_update(of=SeriesRow))
            )
            if len(series) < len(bags):
                raise SeriesNotFound("a series of this prediction was erased meanwhile")
            patient_key = series[0].patient_key
            session.add(
                PredictionRow(prediction_id=prediction_id, patient_key=patient_key, head_id=head_id, asked=asked)
            )
            session.flush()
            for series_uid, content in bags.items():
                session.add(PredictionBagRow(prediction_id=prediction_id, series_uid=series_uid, content=content))
