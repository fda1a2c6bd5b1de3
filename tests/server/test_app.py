"""What holds for every route."""

from __future__ import annotations

from harmonium.engine.statistics import EngineStatistics
from harmonium.model.expert_cache import ExpertCounts
from harmonium.server import ServerState
from tests.scripted_chat import REASONED
from tests.server.client import call, chat, engine_of, error_of, make_state


def test_server_says_how_it_stands() -> None:
    state = make_state(REASONED)
    loading = ServerState()
    assert call(state, "GET", "/health").json() == {"status": "ready"}
    assert call(state, "GET", "/ready").status_code == 200
    assert call(loading, "GET", "/health").json() == {"status": "loading", "loaded": 0.0}
    assert call(loading, "GET", "/ready").status_code == 503
    assert call(state, "HEAD", "/ready").status_code == 200
    assert call(loading, "HEAD", "/health").content == b""
    state.drain()
    assert call(state, "GET", "/health").json() == {"status": "draining"}


def test_request_is_refused_with_retry_after_unless_ready() -> None:
    draining = make_state(REASONED)
    draining.drain()
    for state, code in ((ServerState(), "server_loading"), (draining, "server_draining")):
        response = chat(state)
        assert error_of(response, 503)["code"] == code
        assert response.headers["retry-after"] == "5"


def test_unknown_path_and_method_are_error_objects() -> None:
    state = make_state(REASONED)
    assert "no such path" in error_of(call(state, "GET", "/v2/x"), 404)["message"]
    assert "not allowed" in error_of(call(state, "GET", "/v1/chat/completions"), 405)["message"]


def test_model_has_all_its_names_and_no_other() -> None:
    state = make_state(REASONED, model_names=("gpt-oss-20b", "openai/gpt-oss-20b"))
    names = [model["id"] for model in call(state, "GET", "/v1/models").json()["data"]]
    assert names == ["gpt-oss-20b", "openai/gpt-oss-20b"]
    assert call(state, "GET", "/v1/models/openai/gpt-oss-20b").json()["root"] == "gpt-oss-20b"
    assert chat(state, model="openai/gpt-oss-20b").json()["model"] == "openai/gpt-oss-20b"
    assert chat(state).json()["model"] == "gpt-oss-20b"
    error = error_of(chat(state, model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_metrics_count_streamed_experts_where_there_are_some() -> None:
    state = make_state(REASONED)
    assert "expert" not in call(state, "GET", "/metrics").text
    counts = ExpertCounts(hits=7, late_hits=2, misses=3, guesses=5, true_guesses=4, bytes_read=1 << 20)
    engine_of(state).statistics = EngineStatistics(experts=counts)  # type: ignore[attr-defined]
    text = call(state, "GET", "/metrics").text
    for line in (
        "hits_total 7.0",
        "late_hits_total 2.0",
        "misses_total 3.0",
        "read_bytes_total 1.048576e+06",
    ):
        assert f"harmonium:expert_{line}\n" in text
    for line in ("guesses_total 5.0", "true_guesses_total 4.0", "wait_seconds_total 0.0"):
        assert f"harmonium:expert_{line}\n" in text


def test_metrics_count_what_happened_under_vllm_s_names() -> None:
    state = make_state(REASONED, model_names=("gpt-oss-20b",))
    usage = chat(state).json()["usage"]
    chat(state, stream=True)
    call(state, "POST", "/v1/completions", json={"prompt": "x"})
    text = call(state, "GET", "/metrics").text
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    label = '{model_name="gpt-oss-20b"}'
    assert values[f"vllm:prompt_tokens_total{label}"] == 2 * usage["prompt_tokens"] + 1
    assert values[f"vllm:generation_tokens_total{label}"] == 3 * usage["completion_tokens"]
    assert values[f"vllm:time_to_first_token_seconds_count{label}"] == 3
    assert values[f"vllm:request_time_per_output_token_seconds_count{label}"] == 2
    assert values[f"vllm:inter_token_latency_seconds_count{label}"] == 6
    assert values[f"vllm:e2e_request_latency_seconds_count{label}"] == 3
    assert values['harmonium:http_responses_total{path="/v1/chat/completions",status="200"}'] == 2
