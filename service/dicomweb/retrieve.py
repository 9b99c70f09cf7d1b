"""WADO-RS: instances, their metadata, bulk data and frames, out of the archive (PS3.18 10.4)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset, FileDataset
from pydicom.filewriter import dcmwrite
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from models.ct.decode import DECODERS
from models.ct.errors import UndecodableSlice
from models.ct.header import NotDicom, read_elements, read_header, read_whole
from models.ct.pixels import decoded_frame, decompressed, frame_count, stored_frame, syntax_of
from service.dicom_json import BULK_BYTES, is_bulk, to_json
from service.dicomweb.addresses import Addresses
from service.dicomweb.media import DICOM, OCTETS, RELATED, Choice, Media, chosen
from service.dicomweb.multipart import Body, Part, related, started
from service.errors import (
    BadDicomWeb,
    BulkDataNotFound,
    FrameNotFound,
    InstanceNotFound,
    NotAcceptable,
    SeriesNotFound,
    StudyNotFound,
)
from service.storage.archive import Archive
from service.storage.stores import Stores

READ_BYTES = 1 << 20
AS_STORED = "*"
PIXEL_DATA = "7FE00010"

# Media types of compressed frames (PS3.18 table 8.7.3-5).
FRAMES: dict[str, list[UID]] = {
    "image/jpeg": [JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1],
    "image/jls": [JPEGLSLossless, JPEGLSNearLossless],
    "image/jp2": [JPEG2000Lossless, JPEG2000],
    "image/jphc": [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K],
    "image/dicom-rle": [RLELossless],
}


@dataclass(frozen=True)
class Kept:
    """An instance in the archive."""

    study_uid: str
    series_uid: str
    sop_uid: str
    archive: Archive

    @contextmanager
    def reading(self) -> Iterator[Path]:
        """Its file, as long as the block lasts."""
        with self.archive.local(self.series_uid, [self.sop_uid]) as (path,):
            yield path

    def address(self, addresses: Addresses) -> str:
        return addresses.instance(self.study_uid, self.series_uid, self.sop_uid)


def instances(stores: Stores, study_uid: str, series_uid: str | None = None, sop_uid: str | None = None) -> list[Kept]:
    """A study's instances, or those of one of its series, or one, to be read. Raises NotFound of the three kinds,
    or Damaged."""
    every = stores.studies.series_uids(study_uid)
    if not every:
        raise StudyNotFound(f"no study {study_uid}")
    if series_uid is not None and series_uid not in every:
        raise SeriesNotFound(f"study {study_uid} has no series {series_uid}")
    chosen_series = every if series_uid is None else [series_uid]
    for each in chosen_series:
        stores.archive.verify(each, None if sop_uid is None else [sop_uid])
    here = [(each, uid) for each in chosen_series for uid in stores.archive.sop_uids(each) if sop_uid in (None, uid)]
    if sop_uid is not None and not here:
        raise InstanceNotFound(f"series {series_uid} has no instance {sop_uid}")
    return [Kept(study_uid, each, uid, stores.archive) for each, uid in here]


def dicom_files(kept: Sequence[Kept], accept: str, addresses: Addresses) -> Body:
    """The instances as DICOM files, as stored where the caller accepts that. Raises NotAcceptable."""
    many, one = Media(RELATED, DICOM), Media(DICOM)
    choice = chosen(accept, [many, one] if len(kept) == 1 else [many])
    _check_syntaxes(kept, choice)
    if choice.media == one:
        return Body(DICOM, started(_file(kept[0], choice)))
    return related(DICOM, (Part(DICOM, each.address(addresses), _file(each, choice)) for each in kept))


def metadata(kept: Iterable[Kept], addresses: Addresses) -> Iterator[bytes]:
    """A JSON array of every instance's elements; large binary values and pixels by their address."""
    separator = b"["
    for each in kept:
        address = f"{each.address(addresses)}/bulkdata/"
        with each.reading() as path:
            elements = to_json(read_elements(path, BULK_BYTES), address=address.__add__)
        yield separator + json.dumps(elements, allow_nan=False).encode()
        separator = b","
    yield b"]" if separator == b"," else b"[]"


def bulk_data(kept: Kept, place: str, accept: str, addresses: Addresses) -> Body:
    """One bulk value, by its place in the metadata: `TAG`, or `TAG/ITEM/TAG` in sequences. Of pixels, all frames."""
    with kept.reading() as path:
        dataset = read_elements(path, BULK_BYTES)
        if place != PIXEL_DATA:
            value = _bulk_value(dataset, place)
    if place == PIXEL_DATA:
        return _frames(kept, range(1, frame_count(dataset) + 1), accept, addresses)
    choice = chosen(accept, [Media(RELATED, OCTETS), Media(OCTETS)])
    if choice.media.kind == OCTETS:
        return Body(OCTETS, iter([value]))
    return related(OCTETS, [Part(OCTETS, f"{kept.address(addresses)}/bulkdata/{place}", [value])])


def frames(kept: Kept, numbers: str, accept: str, addresses: Addresses) -> Body:
    """Frames by their numbers, from 1: decoded, or as stored where the caller accepts that.

    Raises BadDicomWeb, FrameNotFound or NotAcceptable.
    """
    return _frames(kept, frame_numbers(numbers), accept, addresses)


def frame_numbers(numbers: str) -> list[int]:
    """`1,3,5` as numbers. Raises BadDicomWeb."""
    parts = numbers.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise BadDicomWeb("the frames are not numbers between commas, expected as 1,2,3")
    found = [int(part) for part in parts]
    if len(set(found)) < len(found):
        raise BadDicomWeb("a frame is named twice, expected each once")
    return found


def check_frames(dataset: Dataset, numbers: Sequence[int]) -> None:
    """Raises FrameNotFound where the dataset lacks one of the frames, or has no pixels."""
    count = frame_count(dataset) if "PixelData" in dataset else 0
    if missing := next((each for each in numbers if not 1 <= each <= count), None):
        raise FrameNotFound(f"no frame {missing}, expected 1 to {count}")
    if 0 in numbers:
        raise FrameNotFound(f"no frame 0, expected 1 to {count}")


def _check_syntaxes(kept: Sequence[Kept], choice: Choice) -> None:
    """Before the first byte is sent: each file is as wanted, or can be decoded. Raises NotAcceptable."""
    if AS_STORED in choice.syntaxes:
        return
    for each in kept:
        syntax = _syntax(each)
        if syntax not in choice.syntaxes and not (_explicit(choice) and syntax in DECODERS):
            raise NotAcceptable(f"instance {each.sop_uid} is stored as {syntax}, which is neither accepted nor decoded")


def _syntax(kept: Kept) -> UID:
    with kept.reading() as path:
        return syntax_of(read_header(path))


def _explicit(choice: Choice) -> bool:
    """Explicit VR little endian is also what is meant where nothing is said (PS3.18 8.7.3.5.2)."""
    return bool(choice.syntaxes & {"", str(ExplicitVRLittleEndian)})


def _file(kept: Kept, choice: Choice) -> Iterator[bytes]:
    if AS_STORED not in choice.syntaxes:
        syntax = _syntax(kept)
        if syntax not in choice.syntaxes and syntax != ExplicitVRLittleEndian:
            yield _explicit_bytes(kept)
            return
    with kept.reading() as path, path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def _explicit_bytes(kept: Kept) -> bytes:
    content = BytesIO()
    try:
        with kept.reading() as path:
            whole = read_whole(path)
        dcmwrite(content, decompressed(whole), enforce_file_format=True)
    except UndecodableSlice as error:
        raise NotAcceptable(f"instance {kept.sop_uid} cannot be decoded: {error}") from error
    except Exception as error:  # pydicom writes no element that breaks its VR's rules, and would quote it
        found = f"instance {kept.sop_uid} cannot be written as explicit VR little endian"
        raise NotAcceptable(f"{found}: {type(error).__name__}; transfer-syntax=* answers it as stored") from error
    return content.getvalue()


def _frames(kept: Kept, wanted: Sequence[int], accept: str, addresses: Addresses) -> Body:
    """Frames are read from the file while they are sent, so it stays until the last has been."""
    with ExitStack() as stack:
        dataset = read_elements(stack.enter_context(kept.reading()), BULK_BYTES)
        body = _body_of_frames(kept, dataset, wanted, accept, addresses)
        open_still = stack.pop_all()
    return Body(body.content_type, _closing(open_still, body.chunks))


def _closing(stack: ExitStack, chunks: Iterator[bytes]) -> Iterator[bytes]:
    with stack:
        yield from chunks


def _body_of_frames(kept: Kept, dataset: FileDataset, wanted: Sequence[int], accept: str, addresses: Addresses) -> Body:
    check_frames(dataset, wanted)
    syntax = syntax_of(dataset)
    compressed = [Media(RELATED, kind) for kind, syntaxes in FRAMES.items() if syntax in syntaxes]
    single = [Media(OCTETS)] if len(wanted) == 1 else []
    choice = chosen(accept, [Media(RELATED, OCTETS), *single, *compressed])
    read, sent = _frame_reader(choice, syntax)
    kind = choice.media.part or choice.media.kind
    content_type = f"{kind}; transfer-syntax={sent}"
    made = (_frame(read, dataset, number - 1) for number in wanted)
    if choice.media.kind == OCTETS:
        return Body(content_type, started(made))
    address = f"{kept.address(addresses)}/frames"
    parts = (Part(content_type, f"{address}/{number}", [frame]) for number, frame in zip(wanted, made, strict=True))
    return related(kind, parts)


def _frame_reader(choice: Choice, syntax: UID) -> tuple[partial[bytes], str]:
    """How a frame is read, and the transfer syntax it is then in. Raises NotAcceptable."""
    image = choice.media.part.startswith("image/")
    if AS_STORED in choice.syntaxes or syntax in choice.syntaxes or (image and "" in choice.syntaxes):
        sent = syntax if syntax.is_encapsulated else ExplicitVRLittleEndian
        return partial(stored_frame), str(sent)
    if _explicit(choice) and not image:
        return partial(decoded_frame), str(ExplicitVRLittleEndian)
    raise NotAcceptable(f"the frames are stored as {syntax}, which is not accepted, and are not encoded anew")


def _frame(read: partial[bytes], dataset: FileDataset, index: int) -> bytes:
    try:
        return read(dataset, index)
    except UndecodableSlice as error:
        raise NotAcceptable(f"frame {index + 1} cannot be decoded: {error}") from error


def _bulk_value(dataset: Dataset, place: str) -> bytes:
    """Raises BulkDataNotFound."""
    try:
        *inner, last = place.split("/")
        for tag, item in zip(inner[::2], inner[1::2], strict=True):
            dataset = dataset[Tag(int(tag, 16))].value[int(item)]
        element = dataset[Tag(int(last, 16))]
        if is_bulk(element):
            return bytes(element.value)
    except (NotDicom, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        pass
    raise BulkDataNotFound("no bulk data here, expected an address that the metadata names")
