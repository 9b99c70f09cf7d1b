"""A prefix of an S3 bucket as the place of a store's bytes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
import tenacity
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from service.errors import StorageUnreachable
from service.remotes import S3Prefix
from service.storage.staging import staging

PAGE = 1000  # objects, the most that S3 lists, or deletes, at once
AT_ONCE = 8  # files of a series that are sent, or fetched
CONNECTIONS = 64  # of one process: as many as its threads read at once
CONNECT_SECONDS = 5.0  # a server that is away is told soon; boto3 tries again by its own settings

ANY = "us-east-1"  # the region of servers that have none

GONE = {"404", "NoSuchKey"}
TAKEN = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
NO_CONDITIONS = {"501", "NotImplemented"}
BEYOND = {"416", "InvalidRange"}

Answer = TypeVar("Answer")

# boto3 tries a request again, but not a body that breaks off.
again = tenacity.retry(
    retry=tenacity.retry_if_exception_type((IncompleteReadError, ReadTimeoutError, ResponseStreamingError)),
    stop=tenacity.stop_after_attempt(3),
    wait=tenacity.wait_random_exponential(max=5),
    reraise=True,
)


class Bucket:
    """See Objects. Endpoint, region, credentials and retries are boto3's own settings (`AWS_*`).

    Whatever the bucket's server refuses, or does not answer, raises StorageUnreachable.
    """

    def __init__(self, place: S3Prefix, client: Any = None) -> None:
        self._place = place
        with _named_errors():
            self._client = client or boto3.Session().client(
                "s3", config=Config(max_pool_connections=CONNECTIONS, connect_timeout=CONNECT_SECONDS)
            )

    def below(self, folder: str) -> "Bucket":
        return Bucket(S3Prefix(self._place.bucket, f"{self._key(folder)}/"), self._client)

    def names(self, folder: str = "") -> list[str]:
        prefix = f"{self._key(folder)}/" if folder else self._place.prefix
        found: list[str] = []
        for page in self._pages(prefix, Delimiter="/"):
            found += (each["Prefix"].removesuffix("/") for each in page.get("CommonPrefixes", ()))
            found += (each["Key"] for each in page.get("Contents", ()) if each["Key"] != prefix)
        return sorted(key.removeprefix(prefix) for key in found)

    def exists(self, name: str) -> bool:
        """By a read of one byte: an answer without a body does not tell a missing object from a missing bucket."""
        try:
            self.read_part(name, 0, 1)
        except FileNotFoundError:
            return False
        return True

    def changed_at(self, name: str) -> float | None:
        key = self._key(name)
        pages = *self._pages(f"{key}/"), *self._pages(key, MaxKeys=1)  # the object itself is the first that begins so
        found = [each for page in pages for each in page.get("Contents", ())]
        mine = [each for each in found if each["Key"] == key or each["Key"].startswith(f"{key}/")]
        return max((each["LastModified"].timestamp() for each in mine), default=None)

    def size_bytes(self, folder: str) -> int:
        pages = self._pages(f"{self._key(folder)}/")
        return sum(int(each["Size"]) for page in pages for each in page.get("Contents", ()))

    def read(self, name: str) -> bytes:
        return self._get(name)

    def read_part(self, name: str, start: int, length: int) -> bytes:
        return self._get(name, Range=f"bytes={start}-{start + length - 1}")

    def add_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        """Object by object, each only where there is none, and read back: two writers may be at it at once."""
        for name, content in files.items():
            if not self._put_new(f"{folder}/{name}", content) and not self._holds(f"{folder}/{name}", content):
                return False
        return all(self._holds(f"{folder}/{name}", content) for name, content in files.items())

    def add_files(self, folder: str, files: Sequence[tuple[str, Path]]) -> list[bool]:
        there = set(self.names(folder))  # where a server heeds no condition

        def moved(name: str, staged: Path) -> bool:
            with staged.open("rb") as content:
                added = name not in there and self._put_new(f"{folder}/{name}", content)
            staged.unlink()
            return added

        return _at_once(moved, files)

    def replace_file(self, name: str, staged: Path) -> None:
        with _named_errors(), staged.open("rb") as content:
            self._client.put_object(Bucket=self._place.bucket, Key=self._key(name), Body=content)

    @contextmanager
    def local(self, names: Sequence[str], staging_dir: Path) -> Iterator[list[Path]]:
        """Copies, which go at the block's end, or with what killed processes have left."""
        with staging(staging_dir) as folder:
            paths = [folder / str(number) / Path(name).name for number, name in enumerate(names)]

            def fetch(name: str, path: Path) -> None:
                with suppress(FileNotFoundError):
                    content = self.read(name)
                    path.parent.mkdir()
                    path.write_bytes(content)

            _at_once(fetch, list(zip(names, paths, strict=True)))
            yield paths

    def remove(self, name: str) -> None:
        key = self._key(name)
        below = [each["Key"] for page in self._pages(f"{key}/") for each in page.get("Contents", ())]
        self._delete([*below, key])

    def keeps_versions(self) -> bool:
        with _named_errors():
            return bool(self._client.get_bucket_versioning(Bucket=self._place.bucket).get("Status") == "Enabled")

    @property
    def uri(self) -> str:
        return str(self._place).removesuffix("/")

    def lance_options(self) -> dict[str, str]:
        """The same server, region and credentials for Lance, as its storage options. Credentials that expire it finds
        itself, by a role or web identity."""
        session, url = boto3.Session(), str(self._client.meta.endpoint_url)
        credentials = session.get_credentials()
        options = {"aws_region": session.region_name} if session.region_name else {}  # else it asks the bucket
        if not url.endswith(".amazonaws.com"):
            options = {"aws_endpoint": url, "allow_http": str(url.startswith("http:")), "aws_region": ANY, **options}
        if credentials is not None and not isinstance(credentials, RefreshableCredentials):
            options |= {"aws_access_key_id": credentials.access_key, "aws_secret_access_key": credentials.secret_key}
            options |= {"aws_session_token": credentials.token} if credentials.token else {}
        return options

    def _key(self, name: str) -> str:
        return self._place.prefix + name

    def _pages(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        options = {"MaxKeys": PAGE, "Prefix": prefix, "Bucket": self._place.bucket, **options}
        once = options["MaxKeys"] == 1
        with _named_errors():
            while True:
                page = self._client.list_objects_v2(**options)
                yield page
                if once or not page.get("IsTruncated"):
                    return
                options["ContinuationToken"] = page["NextContinuationToken"]

    @again
    def _body(self, name: str, **options: Any) -> bytes:
        answer = self._client.get_object(Bucket=self._place.bucket, Key=self._key(name), **options)
        content: bytes = answer["Body"].read()
        return content

    def _get(self, name: str, **options: Any) -> bytes:
        with _named_errors():
            try:
                return self._body(name, **options)
            except ClientError as error:
                if _code(error) in BEYOND:
                    return b""
                raise

    def _put_new(self, name: str, content: bytes | BinaryIO) -> bool:
        """False where there is an object of this name already."""
        put = {"Bucket": self._place.bucket, "Key": self._key(name), "Body": content}
        with _named_errors():
            try:
                self._client.put_object(**put, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in TAKEN:
                    return False
                if _code(error) not in NO_CONDITIONS:
                    raise
                if self.exists(name):
                    return False
                if not isinstance(content, bytes):
                    content.seek(0)
                self._client.put_object(**put)
        return True

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return self.read(name) == content
        except FileNotFoundError:
            return False

    def _delete(self, keys: Iterable[str]) -> None:
        every = [{"Key": key} for key in keys]
        for start in range(0, len(every), PAGE):
            with _named_errors():
                answer = self._client.delete_objects(
                    Bucket=self._place.bucket, Delete={"Objects": every[start : start + PAGE], "Quiet": True}
                )
            if refused := answer.get("Errors"):
                raise StorageUnreachable(f"the object store deletes nothing: {refused[0].get('Code')}")


def _at_once(do: Callable[[str, Path], Answer], files: Sequence[tuple[str, Path]]) -> list[Answer]:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda file: do(*file), files))


@contextmanager
def _named_errors() -> Iterator[None]:
    """boto's errors as ours; its messages may have an object's key, and so a series' UID."""
    try:
        yield
    except ClientError as error:
        if _code(error) in GONE:
            raise FileNotFoundError("no such object") from None
        raise StorageUnreachable(f"the object store answers {_code(error)}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise StorageUnreachable(f"the object store does not answer: {type(error).__name__}") from None


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) or "an error"
