"""What a worker process opens once: the stores, the loaded networks, the decoding processes."""

import os
import socket
from functools import cache

from models.ct.slices import SlicePreparer
from models.load import Encoder, load_encoder
from models.specs import ENCODERS
from service.settings import Settings
from service.storage.stores import Stores, open_stores


class Resources:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stores: Stores = open_stores(settings)
        self.preparer = SlicePreparer(settings.decode_processes)
        self.holder = f"{socket.gethostname()}:{os.getpid()}"
        self._encoders: dict[str, Encoder] = {}

    def encoder(self, name: str) -> Encoder:
        """The encoder by name or id; raises MissingWeights or WrongWeights."""
        name = name.partition("@")[0]
        if name not in self._encoders:
            self._encoders[name] = load_encoder(ENCODERS[name], self.settings.weights_path)
        return self._encoders[name]

    def close(self) -> None:
        self.preparer.close()
        self.stores.close()


@cache
def resources() -> Resources:
    """This process's resources, opened on first use."""
    return Resources(Settings())
