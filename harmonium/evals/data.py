"""Data sets: files of a folder, or of the hub, read as rows.

A file is used as it was published: .jsonl (also .gz), .json (a list), .csv with a header, .parquet (which
needs pyarrow). Nothing in it is run.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from harmonium.errors import ConfigError

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HubFile:
    """repo: of a data set on the Hugging Face hub. name: of the file in it."""

    repo: str
    name: str


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a task's rows come from.

    patterns: names that the files have in a local folder; the first that matches anything is taken, with all
    that it matches, in the order of their names. hub: files on the hub, together the same rows.
    columns: the rows must have these.
    """

    patterns: Sequence[str]
    hub: Sequence[HubFile]
    columns: Sequence[str]


@dataclass(frozen=True, slots=True)
class LoadedData:
    """rows: each with the name of its file, without ending. digest: SHA-256 of the files' bytes."""

    rows: tuple[tuple[str, Row], ...]
    digest: str


def load_data(data_set: DataSet, folder: Path | None) -> LoadedData:
    """The rows, from the folder or, where that is None, from the hub (and its cache).

    Raises ConfigError for what is not there, cannot be read or lacks a column.
    """
    paths = _from_hub(data_set) if folder is None else _from_folder(data_set, folder)
    rows: list[tuple[str, Row]] = []
    digest = hashlib.sha256()
    for path in paths:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        digest.update(raw)
        name = path.name.split(".")[0]
        for number, row in enumerate(_rows(path, raw), start=1):
            _check_columns(row, data_set.columns, f"{path}, row {number}")
            rows.append((name, row))
    if not rows:
        raise ConfigError(f"{', '.join(str(path) for path in paths)}: no rows")
    return LoadedData(tuple(rows), digest.hexdigest())


def _from_folder(data_set: DataSet, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"--data {folder} is no folder")
    for pattern in data_set.patterns:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if found:
            return found
    raise ConfigError(
        f"--data {folder} holds none of {', '.join(data_set.patterns)} (docs/evals.md says more)"
    )


def _from_hub(data_set: DataSet) -> list[Path]:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            "data sets come from the hub with the extra [eval] (pip install 'harmonium[eval]'), or from "
            f"files that you have: --data FOLDER with {' or '.join(data_set.patterns)}"
        ) from None
    return [_download(hub, file) for file in data_set.hub]


def _download(hub: ModuleType, file: HubFile) -> Path:
    try:
        return Path(hub.hf_hub_download(file.repo, file.name, repo_type="dataset"))
    except Exception as error:  # the hub's own tree, the network's, the system's: it is not here
        told = str(error).strip().splitlines()
        raise ConfigError(
            f"{file.name} of the data set {file.repo} cannot be had from the hub: "
            f"{told[0] if told else type(error).__name__} (--data FOLDER reads files that you have)"
        ) from None


def _rows(path: Path, raw: bytes) -> Iterator[Row]:
    name = path.name.lower()
    try:
        if name.endswith(".gz"):
            raw, name = gzip.decompress(raw), name.removesuffix(".gz")
        if name.endswith(".parquet"):
            yield from _parquet_rows(path, raw)
            return
        text = raw.decode("utf-8-sig")
        if name.endswith(".csv"):
            yield from csv.DictReader(io.StringIO(text, newline=""))
        elif name.endswith(".json"):
            yield from json.loads(text)
        else:
            # Not splitlines(): a JSON text may hold U+2028 as it is.
            yield from (json.loads(line) for line in text.split("\n") if line.strip())
    except (ValueError, EOFError, csv.Error, RecursionError, TypeError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} cannot be read as {name.rsplit('.', 1)[-1]}: {error}") from None


def _parquet_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{path} is a parquet file, which needs pyarrow (pip install 'harmonium[eval]')"
        ) from None
    yield from parquet.read_table(io.BytesIO(raw)).to_pylist()


def _check_columns(row: object, columns: Sequence[str], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected an object with {', '.join(columns)}")
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, row))}")


def mmlu_csv_rows(path: Path) -> Iterator[Row]:
    """Rows of the authors' own files (SUBJECT_test.csv): question, four options, letter; no header.

    Source: the layout of hendrycks/test, data/test.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.reader(file), start=1):
                if len(cells) != 6 or cells[5] not in "ABCD" or not cells[5]:
                    raise ConfigError(
                        f"{path}, row {number}: expected question, four options and a letter of ABCD"
                    )
                yield {"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5])}
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from None
