"""JSONL files that grow row by row and survive a kill.

Knows: one process writes a file at a time, a torn last line is repaired, a whole file is
replaced at one go. Does not know what the rows mean.
"""

import contextlib
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Row = dict[str, Any]


@dataclass
class Journal:
    """Rows of a JSONL file that one process at a time goes on writing.

    A kill costs at most the row being written. Without a file the rows stay in memory.
    """

    rows: list[Row] = field(default_factory=list)
    file: typing.BinaryIO | None = None

    def append(self, *rows: Row) -> None:
        """Add rows and write them down, all in one write."""
        data = b"".join(map(line_of, rows))
        if self.file is not None and self.file.write(data) < len(data):
            raise OSError(f"{self.file.name}: the disk took only part; is it full?")
        self.rows += rows


@contextlib.contextmanager
def open_journal(path: str | os.PathLike | None, wait: float = 0) -> Iterator[Journal]:
    """Open a journal with the rows that earlier runs left in it.

    Raises BlockingIOError where another process has it open for `wait` seconds more.
    """
    if path is None:
        yield Journal()
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(f"{path}.lock").acquire(timeout=wait)
    except Timeout:
        raise BlockingIOError(
            f"another run is writing {path}: let it end, or name another output"
        ) from None
    with held, path.open("ab", buffering=0) as file:
        _mend_end(path)
        yield Journal(list(read_jsonl(path)), file)


def _mend_end(path: Path) -> None:
    """Cut off a torn last line; give a whole one that lacks it its newline."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    try:
        json.loads(data[end:])
    except ValueError:
        os.truncate(path, end)
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON in UTF-8. Raises ValueError on NaN and infinity."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, which UTF-8 cannot hold, is escaped and so kept as it is.
    return text.encode("utf-8", "backslashreplace")


def read_jsonl(
    path: str | os.PathLike, keys: Sequence[str] = (), torn_end: bool = False
) -> Iterator[Row]:
    """Objects of a JSONL file, each with `keys`. Raises ValueError that names a bad line.

    With `torn_end` a last line that a kill cut off is left out.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if torn_end and not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object")
            if missing := [key for key in keys if key not in row]:
                raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
            yield row


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: a kill leaves the old one or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
