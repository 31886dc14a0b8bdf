"""Tables as JSON, and several files that appear together or not at all.

Knows frames and folders. Does not know what a report says.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def table_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as plain objects, with a named index as their first fields."""
    named = any(name is not None for name in table.index.names)
    table = table.reset_index() if named else table
    return [{k: plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def plain(value: Any) -> Any:
    """A value that JSON has: NumPy numbers unwrapped, NaN and infinity as null."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_together(folder: Path, writers: dict[str, Callable[[Path], Any]]) -> None:
    """Write files under passing names, and only when all are whole take their places."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{os.getpid()}-{name}" for name in writers}
    try:
        for name, write in writers.items():
            write(partial[name])
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
