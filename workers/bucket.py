"""DICOM in an S3 bucket: listed page by page, headers by ranged reads, objects to files."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from service.errors import CredentialsRefused, SourceAway, SourceFailed, SourceNotFound, SourceRefused
from service.remotes import S3Prefix
from service.storage.bucket import again
from service.storage.files import ExportFile
from workers.sources import NotFetched, identified, in_threads, of_one_file

PAGE = 1000  # objects, the most that S3 lists at once
HEADER_BYTES = 64 * 2**10  # of a ranged read: the header of nearly every CT slice is shorter

REFUSED = {"403", "AccessDenied", "AllAccessDisabled"}
LOCKED = {"401", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
GONE = {"404", "NoSuchBucket", "NoSuchKey"}
MAY_PASS = {"429", "500", "502", "503", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}


class Bucket:
    """A prefix of a bucket as an export's source. Raises SourceFailed, by the kinds of it.

    Endpoint, region, credentials and retries are boto3's own settings (`AWS_*`). Shared by threads.
    """

    def __init__(self, place: S3Prefix, at_once: int) -> None:
        self.at_once = at_once
        self._place = place
        with _named_errors():
            self._client = boto3.Session().client("s3", config=Config(max_pool_connections=max(10, at_once)))

    def entries(self) -> Iterator[ExportFile]:
        """Its objects in the order of their keys; one page at a time is held."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._place.bucket, Prefix=self._place.prefix, PaginationConfig={"PageSize": PAGE}
        )
        with _named_errors():
            for page in pages:
                for found in page.get("Contents", []):
                    if not found["Key"].endswith("/"):  # what consoles make for a folder
                        name = found["Key"].removeprefix(self._place.prefix)
                        yield ExportFile(name.encode(), found["Size"])

    def executor(self, processes: int) -> Executor:
        return ThreadPoolExecutor(1)

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        return list(in_threads(self._identified, files, self.at_once))

    def fetch(self, file: ExportFile, target: Path) -> None:
        with of_one_file(), _named_errors():
            self._client.download_file(
                self._place.bucket, self._key(file), str(target), Config=TransferConfig(use_threads=False)
            )

    def _identified(self, file: ExportFile) -> ExportFile:
        remote = Ranged(partial(self._read, self._key(file)), file.size)
        try:
            with of_one_file():
                found = identified(file, io.BufferedReader(remote, HEADER_BYTES))
                remote.check()
                return found
        except NotFetched as error:
            return file.aside(error.reason, str(error))

    def _key(self, file: ExportFile) -> str:
        return self._place.prefix + file.name.decode()

    def _read(self, key: str, start: int, stop: int) -> bytes:
        with _named_errors():
            return self._range(key, f"bytes={start}-{stop - 1}")

    @again
    def _range(self, key: str, wanted: str) -> bytes:
        answer = self._client.get_object(Bucket=self._place.bucket, Key=key, Range=wanted)
        content: bytes = answer["Body"].read()
        return content


class Ranged(io.RawIOBase):
    """A file whose bytes from `start` to `stop` are read where they lie, only as far as it is asked for."""

    name = ""  # pydicom asks a file for it

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read_range = read
        self._size = size
        self._at = 0
        self._failed: SourceFailed | None = None

    def check(self) -> None:
        """Raises what a read has failed with: readers of DICOM take any error for a fault of the file."""
        if self._failed:
            raise self._failed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        try:
            content = self._read_range(self._at, stop)
        except SourceFailed as error:
            self._failed = error
            raise
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


@contextmanager
def _named_errors() -> Iterator[None]:
    """boto's errors as ours; its messages may have the object's key, and so a patient's name."""
    try:
        yield
    except ClientError as error:
        raise _by_code(str(error.response.get("Error", {}).get("Code", ""))) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise CredentialsRefused(
            "no credentials for the bucket, expected them where boto3 looks (AWS_ACCESS_KEY_ID ...)"
        ) from None
    except (BotoCoreError, Boto3Error) as error:
        raise SourceAway(f"the bucket's server does not answer: {type(error).__name__}") from None


def _by_code(code: str) -> SourceFailed:
    if code in REFUSED:
        return SourceRefused(f"the bucket's server answers {code}: these credentials may not read this")
    if code in LOCKED:
        return CredentialsRefused(f"the bucket's server answers {code}, expected credentials that it knows")
    if code in GONE:
        return SourceNotFound(f"the bucket's server answers {code}: it has no such thing")
    if code in MAY_PASS:
        return SourceAway(f"the bucket's server answers {code}, several times")
    if code == "InvalidObjectState":
        return SourceFailed("the object is in cold storage, expected it to be restored first")
    return SourceFailed(f"the bucket's server answers {code or 'an error'}")
