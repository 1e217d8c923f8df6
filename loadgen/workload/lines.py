"""The lines of a trace file, plain or gzip, one at a time, whatever the file is called."""

import csv
import gzip
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from loadgen.workload.records import TraceInvalid

LINE_BYTES_MAX = 4 * 1024 * 1024
"""Bounds memory; a Mooncake line of a million tokens takes about 20 kB."""

_GZIP_MAGIC = b"\x1f\x8b"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that holds something; blank lines and ``#`` comments do not.

    Raises TraceInvalid for a file that is missing, damaged, binary or has an endless line.
    """
    line = 0
    try:
        with _opened(path) as stream:
            while raw := stream.readline(LINE_BYTES_MAX + 1):
                line += 1
                if len(raw) > LINE_BYTES_MAX:
                    raise TraceInvalid(
                        f"the line is longer than {LINE_BYTES_MAX} bytes; is this a text file "
                        "with one request per line?",
                        path=path,
                        line=line,
                    )
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                if text and not text.startswith("#"):
                    yield line, text
    except UnicodeDecodeError:
        raise TraceInvalid("not UTF-8 text", path=path, line=line) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the gzip data are damaged ({error}); fetch the file again"
        raise TraceInvalid(problem, path=path, line=line + 1) from None
    except OSError as error:
        raise TraceInvalid(f"cannot be read: {error.strerror or error}", path=path) from None


def split_row(text: str) -> list[str]:
    """The cells of one CSV line. Quoted cells may hold commas but no line breaks."""
    if '"' not in text:
        return [cell.strip() for cell in text.split(",")]
    return [cell.strip() for cell in next(csv.reader([text]))]


@contextmanager
def _opened(path: Path) -> Generator[IO[bytes]]:
    """The file's content, unpacked when its first bytes are gzip's."""
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == _GZIP_MAGIC
        if packed:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast("IO[bytes]", unpacked)
        else:
            yield file
