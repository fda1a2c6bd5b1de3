"""Figures that OpenAI published, for putting a measured one beside them.

Source: "gpt-oss-120b & gpt-oss-20b Model Card", OpenAI, August 5, 2025, arXiv 2508.10925v1. The gpt-oss
figures at each effort are of Table 3 (pass@1; rows without tools, since these tasks offer none); those of o3,
o4-mini and o3-mini are of Figure 1. In that figure o3 and o4-mini had tools on AIME, which is said beside
them. The card has no figures for GSM8K, HumanEval and IFEval.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925v1, Table 3 and Figure 1"

_TABLE_3 = {
    "aime24": {"gpt-oss-120b": (56.3, 80.4, 95.8), "gpt-oss-20b": (42.1, 80.0, 92.1)},
    "aime25": {"gpt-oss-120b": (50.4, 80.0, 92.5), "gpt-oss-20b": (37.1, 72.1, 91.7)},
    "gpqa": {"gpt-oss-120b": (67.1, 73.1, 80.1), "gpt-oss-20b": (56.8, 66.0, 71.5)},
    "mmlu": {"gpt-oss-120b": (85.9, 88.0, 90.0), "gpt-oss-20b": (80.4, 84.0, 85.3)},
}
_FIGURE_1 = {
    "aime24": {"o3": (95.2, "with tools"), "o4-mini": (98.7, "with tools"), "o3-mini": (87.3, "")},
    "aime25": {"o3": (98.4, "with tools"), "o4-mini": (99.5, "with tools"), "o3-mini": (86.5, "")},
    "gpqa": {"o3": (83.3, ""), "o4-mini": (81.4, ""), "o3-mini": (77.0, "")},
    "mmlu": {"o3": (93.4, ""), "o4-mini": (93.0, ""), "o3-mini": (87.0, "")},
}


@dataclass(frozen=True, slots=True)
class Published:
    """percent: accuracy. effort: of gpt-oss; "" for the others, of which the source does not say it.
    remark: what was different.
    """

    model: str
    effort: str
    percent: float
    remark: str = ""


def published(task: str) -> list[Published]:
    """The figures of a task, [] where the source has none."""
    found = [
        Published(model, effort, percent)
        for model, row in _TABLE_3.get(task, {}).items()
        for effort, percent in zip(("low", "medium", "high"), row, strict=True)
    ]
    return [
        *found,
        *(Published(model, "", percent, note) for model, (percent, note) in _FIGURE_1.get(task, {}).items()),
    ]
