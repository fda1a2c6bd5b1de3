"""POST /v1/completions: text and token ids in, exact tokens and log-probabilities out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harmonium.engine import ScriptedEngine, Token
from harmonium.harmony.vocabulary import RETURN, vocabulary
from harmonium.server import ServerConfig, ServerState
from tests.server.client import call, chunks_of, engine_of, error_of, make_state

PATH = "/v1/completions"
TEXT = "one two three<|return|>"


def complete(state: ServerState, **body: Any) -> dict[str, Any]:
    response = call(state, "POST", PATH, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a stream's chunks of one choice add up to."""
    whole: dict[str, Any] = {"text": "", "token_ids": [], "tokens": [], "text_offset": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            whole["text"] += choice["text"]
            whole["token_ids"] += choice.get("token_ids", [])
            whole["tokens"] += (choice["logprobs"] or {}).get("tokens", [])
            whole["text_offset"] += (choice["logprobs"] or {}).get("text_offset", [])
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice["stop_reason"]
    return whole


def test_text_and_token_ids_are_the_same_prompt() -> None:
    state = make_state(TEXT)
    ids = vocabulary().encode("Count: <|end|>")
    assert max(ids) < 199_998
    for prompt in ("Count: <|end|>", ids, [ids], ["Count: <|end|>"]):
        answer = complete(state, prompt=prompt)
        assert answer["choices"][0]["text"] == "one two three"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["stop_reason"] == RETURN
        assert list(engine_of(state).requests[-1].token_ids) == ids
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 4)


def test_each_prompt_has_n_choices_in_order() -> None:
    state = make_state("a<|return|>", "b<|return|>", "c<|return|>", "d<|return|>")
    answer = complete(state, prompt=["x", "y y"], n=2, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert sorted(choice["text"] for choice in answer["choices"]) == ["a", "b", "c", "d"]
    assert [request.sampling.seed for request in engine_of(state).requests] == [7, 8, 7, 8]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"stop": [" thr"]},
        {"stop": ["nowhere", "two th"]},
        {"max_tokens": 2},
        {"skip_special_tokens": False, "ignore_eos": True},
    ],
)
def test_stream_adds_up_to_the_answer_in_one_piece(options: dict[str, Any]) -> None:
    body = {"prompt": "Go", "return_token_ids": True, **options}
    state = make_state(TEXT)
    whole = complete(state, **body)
    response = call(
        state, "POST", PATH, json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    chunks = chunks_of(response)
    choice, stream = whole["choices"][0], joined(chunks)
    for name in ("text", "token_ids", "finish_reason", "stop_reason"):
        assert stream[name] == choice[name], name
    assert stream["tokens"] == (choice["logprobs"] or {}).get("tokens", [])
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_stop_text_is_left_out_and_named() -> None:
    choice = complete(make_state(TEXT), prompt="x", stop=" two")["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", " two")


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    script = "<|channel|>final<|message|>hi<|return|>"
    assert complete(make_state(script), prompt="x")["choices"][0]["text"] == "finalhi"
    choice = complete(make_state(script), prompt="x", skip_special_tokens=False)["choices"][0]
    assert choice["text"] == "<|channel|>final<|message|>hi"


def test_echo_with_logprobs_scores_the_prompt_as_evaluation_tools_read_it() -> None:
    prompt = vocabulary().encode("The sky is blue")
    token = Token(prompt[0], -0.25, ((prompt[0], -0.25), (prompt[1], -2.0)))
    state = ServerState(ServerConfig(), ScriptedEngine([[token]]))
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    choice = complete(state, **body)["choices"][0]
    logprobs = choice["logprobs"]
    lengths = {len(values) for values in logprobs.values()}
    assert lengths == {len(prompt) + 1}
    assert logprobs["token_logprobs"] == [None, 0.0, 0.0, 0.0, -0.25]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-1] == {"The": -0.25}
    assert logprobs["tokens"] == ["The", " sky", " is", " blue", "The"]
    assert logprobs["text_offset"] == [0, 3, 7, 10, 15]
    assert choice["text"] == "The sky is blueThe"
    only_prompt = complete(state, **{**body, "max_tokens": 0})["choices"][0]
    assert only_prompt["text"] == "The sky is blue"
    assert only_prompt["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": []}, "prompt", "expected 1 to"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": [201_088]}, None, "expected 0 to 201,087"),
        ({"prompt": [-1]}, None, "expected 0 to 201,087"),
        ({"prompt": [10**30]}, None, "expected 0 to 201,087"),
        ({"prompt": {"a": 1}}, "prompt", "prompt"),
        ({"prompt": ["a"] * 129}, "prompt", "expected 1 to 128"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "130 answers"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "expected 0 to 20"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": -5}, "max_tokens", "max_tokens is -5"),
        ({"prompt": "a", "stop": [""]}, "stop", "empty text"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "logit_bias names 'x'"),
        ({"prompt": "a", "logit_bias": {"201088": 1}}, "logit_bias", "201,088"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(
    body: dict[str, Any], param: str | None, message: str
) -> None:
    state = make_state(TEXT)
    error = error_of(call(state, "POST", PATH, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert state.num_held == 0


def test_tokenize_and_detokenize_are_each_other_s_inverse() -> None:
    state = make_state(TEXT)
    text = "naïve <|end|> 🙂\n"
    found = call(state, "POST", "/tokenize", json={"prompt": text}).json()
    assert found["count"] == len(found["tokens"])
    assert max(found["tokens"]) < 199_998
    assert call(state, "POST", "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    error_of(call(state, "POST", "/detokenize", json={"tokens": [201_088]}), 400)
    error_of(call(state, "POST", "/tokenize", json={}), 400)


def test_render_shows_what_the_model_is_given() -> None:
    state = make_state("<|channel|>final<|message|>x<|return|>", current_date="2026-01-02")
    body = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]}
    rendered = call(state, "POST", "/v1/chat/completions/render", json=body).json()
    assert "Current date: 2026-01-02" in rendered["text"]
    assert rendered["text"].endswith("<|start|>user<|message|>Hi<|end|><|start|>assistant")
    assert call(state, "POST", "/tokenize", json=body).json()["tokens"] == rendered["token_ids"]
    call(state, "POST", "/v1/chat/completions", json=body)
    assert list(engine_of(state).requests[-1].token_ids) == rendered["token_ids"]
    assert json.dumps(rendered["token_ids"])
