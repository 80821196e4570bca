"""Where a store lies: a directory, or a prefix of a bucket of S3-compatible object storage.

Endpoint, region and credentials of object storage are those of the standard variables (AWS_…) of
each process's environment: they are in no address, no file and no lineage.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import icechunk

from bragg_data.files import write_whole
from bragg_data.store.reading import StoreError

DATA = ("chunks", "manifests", "snapshots", "transactions")  # folders of files that never change
REFERENCES = "refs"  # branches and tags
S3 = "s3"
_KEYS = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
_LIBC = ctypes.CDLL(None, use_errno=True)
_SECONDS = 5.0  # until a connection counts as failed


@dataclass(frozen=True)
class Place:
    """A directory (absolute, as forks travel to other processes), or a prefix of a bucket."""

    uri: str
    directory: Path | None = None
    bucket: str = ""
    prefix: str = ""

    @property
    def storage(self) -> icechunk.Storage:
        """Icechunk's access; the credentials are not in it, so that none travel with a fork."""
        if self.directory is not None:
            return icechunk.local_filesystem_storage(str(self.directory))
        endpoint = _endpoint()
        return icechunk.s3_storage(
            bucket=self.bucket,
            prefix=self.prefix,
            region=_region(),
            endpoint_url=endpoint,
            allow_http=endpoint is not None and endpoint.startswith("http://"),
            force_path_style=endpoint is not None,
            from_env=True,
        )

    @property
    def files(self) -> Any:
        """The files as a file system of pyarrow, with paths relative to the store."""
        from pyarrow import fs

        if self.directory is not None:
            return fs.SubTreeFileSystem(str(self.directory), fs.LocalFileSystem())
        return fs.SubTreeFileSystem(f"{self.bucket}/{self.prefix}", _s3())

    def listed(self, folders: Sequence[str], *, below: bool = False) -> list[Any]:
        """Return what pyarrow knows of the files of some folders, with those ``below`` them."""
        from pyarrow import fs

        entries = []
        for folder in folders:
            selector = fs.FileSelector(folder, True, below)  # or none, if there is no folder
            entries += self.files.get_file_info(selector)
        return [entry for entry in entries if entry.is_file]

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self.files.open_input_file(name) as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes, partial: str) -> None:
        """Give a file its content at once; on a disk, it is called ``partial`` meanwhile."""
        if self.directory is None:
            with self.files.open_output_stream(name) as file:
                file.write(content)
        else:
            file = self.directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content, self.directory / partial)

    def sync(self) -> None:
        """Wait until the files of the store, and their names, are on the disk.

        Icechunk does not. Object storage acknowledges nothing before that. It is one call for the
        file system: fsync takes milliseconds for each file, also where nothing is to be written.
        """
        if self.directory is None:
            return
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            _sync_file_system(descriptor)
        finally:
            os.close(descriptor)

    def check_reachable(self) -> None:
        """Raise a `StoreError` at once if the bucket does not exist or cannot be reached."""
        if self.directory is not None:
            return
        missing = [name for name in _KEYS if not os.environ.get(name)]
        if missing:
            raise StoreError(
                f"{self.uri} needs credentials in the environment, and has no "
                f"{' and no '.join(missing)}."
            )
        where = _endpoint() or "Amazon S3 (AWS_ENDPOINT_URL names another endpoint)"
        try:
            exists = bool(_s3().get_file_info(self.bucket).type)
        except OSError as error:
            if "ACCESS_DENIED" in str(error) or "403" in str(error):
                raise StoreError(
                    f"{where} refuses these credentials for the bucket '{self.bucket}'."
                ) from error
            raise StoreError(
                f"{where} does not answer: {str(error).rpartition('Details: ')[2].rstrip('.')}."
            ) from error
        if not exists:
            raise StoreError(f"There is no bucket '{self.bucket}' at {where}.")


def place_of(uri: str | Path) -> Place:
    """Return the place that a path, a file:// or an s3:// URI names; a `StoreError` if none."""
    if isinstance(uri, Path) or "://" not in uri:
        directory = Path(uri).absolute()
        return Place(directory.as_uri(), directory)
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return place_of(Path(unquote(parts.path)))
    if parts.scheme != S3:
        raise StoreError(
            f"Store '{uri}' is neither on a file system of this machine nor in object storage. "
            f"Give a path, or a URI that begins with file:/// or s3://."
        )
    prefix = parts.path.strip("/")
    if "@" in parts.netloc:
        raise StoreError(
            f"An address with credentials ends in files and lineage: give "
            f"s3://{parts.netloc.rpartition('@')[2]}/{prefix}, and set {' and '.join(_KEYS)}."
        )
    if not (parts.netloc and prefix) or parts.query or parts.fragment:
        raise StoreError(f"'{uri}' does not name a store: give s3://BUCKET/PREFIX.")
    return Place(f"{S3}://{parts.netloc}/{prefix}", None, parts.netloc, prefix)


def _sync_file_system(descriptor: int) -> None:
    syncfs = getattr(_LIBC, "syncfs", None)
    if syncfs is None:  # it is Linux's
        os.sync()
    elif syncfs(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _endpoint() -> str | None:
    names = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _region() -> str:
    names = "AWS_REGION", "AWS_DEFAULT_REGION"
    return next((os.environ[name] for name in names if os.environ.get(name)), "us-east-1")


def _s3() -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=_endpoint(),
        region=_region(),
        connect_timeout=_SECONDS,
        request_timeout=6 * _SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )
