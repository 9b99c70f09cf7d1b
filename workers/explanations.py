"""The recipe of a heat map: one slice through encoder and head, with gradients."""

from dataclasses import asdict

import numpy as np

from models.ct.decode import read_hu
from models.ct.slices import encoder_input
from models.heads.export import from_safetensors
from models.heads.options import HeadOptions
from models.heatmap import heat_map as look
from models.heatmap import label_gradient
from service.storage.bags import slices_of
from service.storage.keys import EmbeddingKey, HeatSpot
from workers.resources import Resources


def heat_map(spot: HeatSpot, worker: Resources) -> None:
    """Make a heat map and store it. Twice changes nothing.

    The API has checked that series, head, window, label and weights are there; where they went since, this
    raises, and whoever asked is told that nothing came.
    """
    stores = worker.stores
    head = stores.heads.ready(spot.head_id)
    encoder = worker.line(head.encoder_id).encoder
    key = EmbeddingKey(spot.series_uid, head.encoder_id)
    receipt, bag = stores.bags.receipt(key, spot.content), stores.bags.get(key, spot.content)
    window = receipt["windows"].index(spot.window)
    ensemble = from_safetensors(stores.heads.weights(head.head_id), HeadOptions(**head.options))
    flat = bag.reshape(-1, bag.shape[2])  # (instances, dim)
    gradient = label_gradient(
        ensemble, flat, spot.slice * len(receipt["windows"]) + window, head.labels.index(spot.label)
    )
    place = slices_of(receipt)[spot.slice]
    with stores.archive.reading(spot.series_uid, [place["sop_uid"]]) as (path,):
        hu = read_hu(path, place["frame"])
    picture = encoder_input(hu, encoder.spec.windows, encoder.spec.input_size)[window]
    found = look(encoder.spec, encoder.network, picture, gradient)
    stores.heatmaps.put(spot, {**asdict(found), "cells": np.round(found.cells, 9).tolist()})
    if not stores.catalog.has(spot.series_uid):  # erased meanwhile
        stores.heatmaps.remove(spot.series_uid)
