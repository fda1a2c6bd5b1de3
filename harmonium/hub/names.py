"""The word MODEL -> a model on a hub: `openai/gpt-oss-20b`, `20b`, `openai-mirror/gpt-oss-20b@REVISION`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from harmonium.errors import ConfigError
from harmonium.hub.settings import SourceName

OPENAI = "openai"
MIRROR = "openai-mirror"
"""Where ModelScope keeps copies of OpenAI's models."""

SHORT_NAMES = {
    "20b": "gpt-oss-20b",
    "120b": "gpt-oss-120b",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
}

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/+-]{0,200}[A-Za-z0-9])?")

HUB_TITLES: dict[SourceName, str] = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on a hub. repo: "owner/name". revision: a branch, tag or commit; None: the hub's main one."""

    source: SourceName
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{at} on {HUB_TITLES[self.source]}"


def parse_name(word: str, source: SourceName | None = None, revision: str | None = None) -> HubName | None:
    """What a word means on a hub; None for one that cannot be the name of a model there.

    source: None takes ModelScope for its mirror's names and Hugging Face for the rest. OpenAI's models are
    found under the name that the hub has for them. revision: wins over one in the word.

    Raises ConfigError for a revision that is none, and one that is given twice.
    """
    repo, at, tail = word.partition("@")
    if at and revision is not None:
        raise ConfigError(f"the revision is given twice: {word!r} and --revision {revision!r}")
    revision = tail if at else revision
    repo = f"{OPENAI}/{SHORT_NAMES[repo]}" if repo in SHORT_NAMES else repo
    if repo.count("/") != 1 or not all(_is_part(part) for part in repo.split("/")):
        return None
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ConfigError(f"the revision is {revision[:200]!r}; expected a branch, a tag or a commit")
    owner, name = repo.split("/")
    if source is None:
        source = "modelscope" if owner == MIRROR else "huggingface"
    if name in SHORT_NAMES.values() and owner in (OPENAI, MIRROR):
        owner = MIRROR if source == "modelscope" else OPENAI
    return HubName(source, f"{owner}/{name}", revision)


def is_openai(name: HubName) -> bool:
    """Whether it is a model of OpenAI's, which both hubs have."""
    owner, model = name.repo.split("/")
    return owner in (OPENAI, MIRROR) and model in SHORT_NAMES.values()


def twin(name: HubName) -> HubName:
    """The same model of OpenAI's on the other hub."""
    model = name.repo.split("/")[1]
    if name.source == "huggingface":
        return HubName("modelscope", f"{MIRROR}/{model}")
    return HubName("huggingface", f"{OPENAI}/{model}")


def _is_part(text: str) -> bool:
    return bool(_PART.fullmatch(text)) and ".." not in text and "--" not in text


def may_be_path(word: str) -> bool:
    """Whether a word that names nothing here reads like a path: it begins like one, or its folder exists."""
    if word.startswith((".", "/", "~")) or "/" not in word:
        return word not in SHORT_NAMES
    return Path(word).parent.is_dir()
