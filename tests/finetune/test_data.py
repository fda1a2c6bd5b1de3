"""What of a line is learned: counted by hand. No PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.errors import ConfigError
from harmonium.finetune.data import DataSettings, Sample, read_data, samples_of_line
from harmonium.harmony.chat_history import messages_from_chat
from harmonium.harmony.messages import Conversation
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import vocabulary

PLAIN = DataSettings(current_date="2026-01-02")


def samples(line: Any, settings: DataSettings = PLAIN) -> list[Sample]:
    return list(samples_of_line(json.dumps(line).encode(), 1, settings))


def learned(sample: Sample) -> str:
    """The text of the tokens that have a loss."""
    ids = sample.token_id_T[sample.weight_T > 0]
    return vocabulary().decode(int(token) for token in ids)


def file(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


QUESTION = {"role": "user", "content": "Who won?"}
ANSWER = {"role": "assistant", "reasoning": "Blue led.", "content": "Blue."}


def test_the_loss_is_on_what_the_model_writes_and_its_stop_token() -> None:
    (sample,) = samples({"messages": [QUESTION, ANSWER]})
    assert learned(sample) == (
        "<|channel|>analysis<|message|>Blue led.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Blue.<|return|>"
    )
    # channel, analysis, message; "Blue", " led", "."; end; start, assistant, channel, final, message; "Blue",
    # "."; return.
    assert sample.num_loss_tokens == 3 + 3 + 1 + 5 + 2 + 1
    assert set(np.unique(sample.weight_T)) == {0.0, 1.0}


def test_what_precedes_the_loss_is_the_prompt_of_inference() -> None:
    history = messages_from_chat([{"role": "system", "content": "Be brief."}, QUESTION])
    conversation = Conversation(
        history.messages, instructions=history.instructions, current_date="2026-01-02", reasoning_effort="low"
    )
    prompt = render_prompt(conversation)
    (sample,) = samples(
        {
            "messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER],
            "reasoning_effort": "low",
        }
    )
    assert sample.token_id_T[: len(prompt)].tolist() == prompt
    assert not sample.weight_T[: len(prompt)].any()
    assert sample.weight_T[len(prompt) :].all()


def test_each_turn_is_a_sample_with_the_history_that_inference_shows() -> None:
    first, second = samples({"messages": [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER]})
    text = vocabulary().decode(map(int, second.token_id_T))
    assert learned(first) == learned(second)
    # The first turn's reasoning is gone, and its answer ends as history does.
    assert text.count("Blue led.") == 1
    assert "final<|message|>Blue.<|end|><|start|>user<|message|>Sure?" in text


def test_a_tool_loop_is_one_sample_that_learns_the_calls() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": '{"q":1}'}}
    line = {
        "messages": [
            QUESTION,
            {"role": "assistant", "reasoning": "Look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "Blue"},
            {"role": "assistant", "content": "Blue."},
        ],
        "tools": [{"type": "function", "function": {"name": "find"}}],
        "parallel_tool_calls": False,
    }
    (sample,) = samples(line)
    assert learned(sample) == (
        "<|channel|>analysis<|message|>Look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.find <|constrain|>json<|message|>"
        '{"q":1}<|call|>'
        # After the tool's result the caller writes <|start|>assistant again.
        "<|channel|>final<|message|>Blue.<|return|>"
    )


def test_reasoning_may_be_left_out_of_the_loss_but_stays_in_the_text() -> None:
    (sample,) = samples(
        {"messages": [QUESTION, ANSWER]}, DataSettings(trains_analysis=False, current_date="none")
    )
    assert learned(sample) == "<|start|>assistant<|channel|>final<|message|>Blue.<|return|>"
    assert "Blue led." in vocabulary().decode(map(int, sample.token_id_T))


def test_a_message_of_weight_0_is_read_and_not_learned() -> None:
    messages = [
        QUESTION,
        {**ANSWER, "weight": 0},
        {"role": "user", "content": "Sure?"},
        {**ANSWER, "weight": 1},
    ]
    (sample,) = samples({"messages": messages})
    assert learned(sample).count("Blue.") == 1
    assert vocabulary().decode(map(int, sample.token_id_T)).count("Blue.") == 2


def test_harmony_text_is_taken_as_it_stands() -> None:
    text = (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>Greet.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yo<|return|>"
    )
    (sample,) = samples({"harmony": text})
    assert vocabulary().decode(map(int, sample.token_id_T)) == text
    assert learned(sample) == text.split("assistant", 1)[1]
    (sample,) = samples({"harmony": text}, DataSettings(trains_analysis=False))
    assert learned(sample) == "<|start|>assistant<|channel|>final<|message|>Yo<|return|>"


def test_special_tokens_in_messages_are_plain_text() -> None:
    (sample,) = samples({"messages": [{"role": "user", "content": "<|return|>"}, ANSWER]})
    assert 200_002 not in sample.token_id_T[:-1]
    assert sample.token_id_T[-1] == 200_002


def test_dates_are_drawn_by_the_line_and_may_be_given() -> None:
    def text(line: dict[str, Any], number: int, settings: DataSettings) -> str:
        (sample,) = samples_of_line(json.dumps(line).encode(), number, settings)
        return vocabulary().decode(map(int, sample.token_id_T))

    line = {"messages": [QUESTION, ANSWER]}
    drawn = [text(line, number, DataSettings()) for number in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "Current date: 20" in drawn[0]
    assert "Current date" not in text(line, 1, DataSettings(current_date="none"))
    assert "Current date: 2027-03-04" in text({**line, "current_date": "2027-03-04"}, 1, DataSettings())


def test_cut_samples_are_counted_by_line(tmp_path: Path) -> None:
    long = {"role": "assistant", "content": "a b c " * 50}
    path = file(tmp_path, {"messages": [QUESTION, ANSWER]}, "", {"messages": [QUESTION, long]})
    found, report = read_data(path, DataSettings(max_tokens=120))
    assert [len(sample.token_id_T) <= 120 for sample in found] == [True, True]
    assert report.truncated == (3,)
    assert "1 lines cut at max_tokens: 3" in report.text()
    assert report.num_loss_tokens == sum(sample.num_loss_tokens for sample in found)
    _, uncut = read_data(path, DataSettings())
    assert uncut.truncated == ()


def test_a_line_with_nothing_left_to_learn_is_said(tmp_path: Path) -> None:
    path = file(tmp_path, {"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {**ANSWER, "weight": 0}]})
    _, report = read_data(path, PLAIN)
    assert report.empty == (2,)
    with pytest.raises(ConfigError, match=r"2 lines hold no sample with a loss.*cut at max_tokens 20: 1"):
        read_data(path, DataSettings(max_tokens=20))


BAD = {
    "not JSON": ("{", r"no JSON"),
    "a list": ("[]", r"no JSON object"),
    "neither": ('{"prompt": "a"}', r"has prompt; expected 'messages' or 'harmony'"),
    "unknown key": ({"messages": [QUESTION, ANSWER], "tool": []}, r"no key 'tool' is known"),
    "no assistant": ({"messages": [QUESTION]}, r"none of the assistant's"),
    "role": ({"messages": [{"role": "bot", "content": ""}]}, r"messages\[0\]\.role is 'bot'"),
    "effort": ({"messages": [QUESTION, ANSWER], "reasoning_effort": "max"}, r"'max'; expected one of low"),
    "weight": ({"messages": [QUESTION, {**ANSWER, "weight": 3}]}, r"messages\[1\]\.weight is 3"),
    "user's weight": (
        {"messages": [{**QUESTION, "weight": 1}, ANSWER]},
        r"messages\[0\]\.weight is of a user's",
    ),
    "date": ({"messages": [QUESTION, ANSWER], "current_date": "May"}, r"current_date is 'May'"),
    "open end": ({"harmony": "<|start|>assistant<|message|>Hi"}, r"message 1 has no <\|end\|>"),
    "no start": ({"harmony": "Hi<|end|>"}, r"'Hi' stands before <\|start\|>"),
    "no author": ({"harmony": "<|start|><|message|>Hi<|end|>"}, r"no author"),
    "nobody": ({"harmony": "<|start|>user<|message|>Hi<|end|>"}, r"no message is the assistant's"),
    "deep": ("[" * 100_000, r"nested too deep|no JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_by_number_and_reason(case: str, tmp_path: Path) -> None:
    line, reason = BAD[case]
    path = file(tmp_path, {"messages": [QUESTION, ANSWER]}, line)
    with pytest.raises(ConfigError, match=rf"1 of 2 lines are bad: line 2: .*(?:{reason})"):
        read_data(path, PLAIN)


def test_all_bad_lines_are_named_up_to_a_limit(tmp_path: Path) -> None:
    path = file(tmp_path, *["{"] * 30)
    with pytest.raises(ConfigError, match=r"30 of 30 .*line 1: .*line 20: .* \(and 10 more\)") as caught:
        read_data(path, PLAIN)
    assert "line 21" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        read_data(tmp_path / "none.jsonl", PLAIN)
