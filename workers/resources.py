"""What a worker process opens once: the stores, and a line for every encoder it is asked for."""

import os
import socket
import threading
from functools import cache, partial

from models.ct.processes import Prepare
from models.ct.slices import prepare_slice
from models.ct.volume import prepare_volume
from models.line import Line
from models.load import load_encoder
from models.modes import by_id
from models.specs import EncoderSpec, WrongWeights, check_licence
from models.zoo import encoders
from service.settings import Settings
from service.storage.stores import Stores, open_stores
from workers.background import Background

# Far longer than any slice, or the volume of any series, takes to prepare.
SLICE_SECONDS, VOLUME_SECONDS = 20.0, 900.0

EXPORTS_AT_ONCE = 4  # one of a whole PACS takes days: somebody else's small one does not wait for it
CLOSE_SECONDS = 5.0  # for exports, and for a training, to hand themselves back when the process ends


class Resources:
    """Shared by the worker's threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stores: Stores = open_stores(settings)
        self.stopping = threading.Event()  # the process was told to end: what it has in hand goes back
        self.exports = Background("export", EXPORTS_AT_ONCE)
        self.trainings = Background("training", 1)
        self.random_numbers = threading.Lock()  # torch's are the process's: one head at a time
        self._lines: dict[str, Line] = {}
        self._loading = threading.Lock()

    @property
    def holder(self) -> str:
        """Who claims work: this thread of this process."""
        return f"{socket.gethostname()}:{os.getpid()}:{threading.get_native_id()}"

    def line(self, encoder_id: str) -> Line:
        """The encoder of this id, loaded. Raises MissingWeights, WrongWeights, CannotRun or LicenceForbids."""
        if encoder_id not in self._lines:
            with self._loading:
                if encoder_id not in self._lines:
                    self._lines[encoder_id] = self._open(self.spec(encoder_id))
        return self._lines[encoder_id]

    def spec(self, encoder_id: str) -> EncoderSpec:
        """The spec, and the way of running it, that has this id here."""
        plain = encoders(self.settings.weights_path).get(encoder_id.partition("@")[0])
        spec = plain and by_id(plain, encoder_id, self.settings.weights_path)
        if spec is None:
            raise WrongWeights(f"this worker has no such encoder, or another, expected {encoder_id}")
        return spec

    def own_encoder_id(self) -> str:
        """The id of the service's encoder, run as its mode says. Raises MissingWeights or WrongWeights."""
        return self.settings.own_encoder_id()

    def close(self) -> None:
        self.stopping.set()
        self.exports.close(CLOSE_SECONDS)
        self.trainings.close(CLOSE_SECONDS)
        for line in self._lines.values():
            line.close()
        self.stores.close()

    def _open(self, spec: EncoderSpec) -> Line:
        check_licence(spec, self.settings.noncommercial)
        with self.random_numbers:  # a new network draws its first weights from the same random numbers
            encoder = load_encoder(spec, self.settings.weights_path)
        volume, (window, *_) = spec.volume, spec.windows
        if volume:
            prepare: Prepare = partial(
                prepare_volume, spacing_mm=volume.spacing_mm, window=window, preparation=volume.preparation
            )
            return Line(encoder, prepare, 1, VOLUME_SECONDS)
        prepare = partial(prepare_slice, windows=spec.windows, size=spec.input_size)
        return Line(encoder, prepare, self.settings.decode_processes, SLICE_SECONDS)


@cache
def resources() -> Resources:
    """This process's resources, opened on first use."""
    return Resources(Settings())
