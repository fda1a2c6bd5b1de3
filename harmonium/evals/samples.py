"""The folder of a run: its settings, and a line for each sample that was judged.

`samples.jsonl` is only ever added to, a line at a time, so that a run that is killed loses at most the
samples that were being answered. A torn last line is cut off when the run goes on. A sample that ended in an
error gets another line when it is asked again; the last one counts.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from harmonium.errors import ConfigError
from harmonium.evals.item import Effort, Item, Reply, Verdict
from harmonium.text_file import write_text

Result = Literal["right", "wrong", "error"]
Key = tuple[str, str, int]
SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one item at one effort.

    number: 0 to K - 1 of the item's samples. result: error means that there was no reply to judge. reply:
    None then. at: seconds since 1970 when it was there.
    """

    id: str
    group: str
    effort: Effort
    number: int
    result: Result
    expected: Any
    extracted: str | None = None
    note: str = ""
    reply: Reply | None = None
    error: str | None = None
    at: float = 0.0

    @property
    def key(self) -> Key:
        return (self.id, self.effort, self.number)


def judged(item: Item, effort: Effort, number: int, reply: Reply, verdict: Verdict) -> Sample:
    """The sample of a reply."""
    result: Result = "right" if verdict.is_right else "wrong"
    return Sample(
        item.id, item.group, effort, number, result, item.expected, verdict.extracted, verdict.note, reply,
        at=time.time(),
    )  # fmt: skip


def failed(item: Item, effort: Effort, number: int, error: str) -> Sample:
    """The sample of an item to which there is no reply, or none that could be judged."""
    return Sample(item.id, item.group, effort, number, "error", item.expected, error=error, at=time.time())


def check_settings(folder: Path, settings: Mapping[str, Any], resumes: bool) -> None:
    """Write the settings of a new run, or compare them with those of the one that goes on.

    Raises ConfigError when the folder holds a run and this one does not resume it, when the settings differ
    (each difference is named), and when the folder cannot be written.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror or error}") from None
        write_text(path, json.dumps(settings, ensure_ascii=False, indent=2) + "\n", may_replace=False)
        return
    if not resumes:
        raise ConfigError(
            f"{folder} holds a run already: --resume goes on with it, --out FOLDER takes another"
        )
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    now = json.loads(json.dumps(settings))
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ConfigError(f"{folder} holds a run with other settings: {'; '.join(different)}")


class SampleFile:
    """The samples of a run; one process at a time. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there and cuts off a torn end.

        Raises ConfigError when another process writes it, or a line in the middle is not ours.
        """
        self.path = folder / SAMPLES_FILE
        self.samples: dict[Key, Sample] = {}
        try:
            self._file: BinaryIO = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self.path} is being written by another run") from None
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                sample = _from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.path}, line {number} is no sample: {error}") from None
            self.samples[sample.key] = sample

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Write it so that it survives this process."""
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.samples[sample.key] = sample

    def answered(self) -> set[Key]:
        """Those that need not be asked again."""
        return {key for key, sample in self.samples.items() if sample.result != "error"}

    def only(self, keys: Iterable[Key]) -> list[Sample]:
        """The samples with these keys, in their order."""
        return [self.samples[key] for key in keys if key in self.samples]


def _from_json(table: Mapping[str, Any]) -> Sample:
    fields = dict(table)
    reply = fields.pop("reply")
    if reply is not None:
        calls = tuple((name, arguments) for name, arguments in reply["tool_calls"])
        reply = Reply(**{**reply, "tool_calls": calls})
    return Sample(**fields, reply=reply)
