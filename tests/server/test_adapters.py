"""LoRA adapters over HTTP: chosen by the request's model name."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from harmonium.config import EngineConfig, LoraSource
from harmonium.engine import EngineInfo, ScriptedEngine
from harmonium.engine.create import create_engine
from harmonium.errors import ConfigError
from harmonium.harmony.grammar_compile import tokenizer as build_grammar_tokenizer
from harmonium.server import ServerConfig, ServerState, create_app
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.engine.serving import check_empty
from tests.lora_files import make_lora
from tests.scripted_chat import gen
from tests.server.client import BASE_URL, HELLO, call, engine_of, with_client

ANSWER = "<|channel|>final<|message|>Hi<|return|>"
INFO = EngineInfo("tiny", 131_072, 201_088, "scripted", ("cat", "org/dog"))
ALL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3}),
    ("/v1/responses", {"input": "Hello"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 100}),
)


def make_state(**config: Any) -> ServerState:
    return ServerState(ServerConfig(**config), ScriptedEngine([gen(ANSWER)], info=INFO))


@pytest.mark.parametrize(("path", "body"), ALL)
@pytest.mark.parametrize("stream", [False, True])
def test_every_api_chooses_the_adapter_by_the_models_name(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    state = make_state(model_names=("base", "other"))

    async def work(client: httpx.AsyncClient) -> None:
        for name in ("cat", "org/dog", "base", "other"):
            answer = await client.post(path, json={**body, "model": name, "stream": stream})
            assert answer.status_code == 200, answer.text
            assert f'"model":"{name}"' in answer.text.replace('": "', '":"')

    with_client(state, work)
    assert [request.adapter for request in engine_of(state).requests] == ["cat", "org/dog", None, None]


@pytest.mark.parametrize(("path", "body"), ALL)
def test_an_unknown_name_is_not_found_and_the_message_lists_adapters(path: str, body: dict[str, Any]) -> None:
    answer = call(make_state(), "POST", path, json={**body, "model": "cow"})
    assert answer.status_code == 404
    assert "there is tiny, cat, org/dog" in answer.text
    assert engine_of(make_state()).requests == []


def test_without_a_name_the_model_itself_answers() -> None:
    state = make_state()
    answer = call(state, "POST", "/v1/chat/completions", json={"messages": HELLO})
    assert answer.json()["model"] == "tiny"
    assert engine_of(state).requests[0].adapter is None


def test_models_lists_adapters_under_their_parent() -> None:
    state = make_state(model_names=("base",))
    listed = call(state, "GET", "/v1/models").json()["data"]
    assert [(model["id"], model["parent"], model["root"]) for model in listed] == [
        ("base", None, "base"),
        ("cat", "base", "cat"),
        ("org/dog", "base", "org/dog"),
    ]
    assert call(state, "GET", "/v1/models/org/dog").json() == listed[2]
    assert call(state, "GET", "/v1/models/cow").status_code == 404


def test_metrics_count_by_adapter() -> None:
    state = make_state()

    async def work(client: httpx.AsyncClient) -> str:
        for name in ("cat", "cat", "tiny"):
            await client.post("/v1/chat/completions", json={"messages": HELLO, "model": name})
        return (await client.get("/metrics")).text

    text = with_client(state, work)
    assert 'harmonium:lora_requests_total{lora_name="cat"} 2.0' in text
    gauge = next(line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{"))
    assert 'max_lora="2"' in gauge and 'running_lora_adapters=""' in gauge
    with state.hold("org/dog"), state.hold("org/dog"), state.hold("cat"), state.hold():
        assert state.held_adapters == ("cat", "org/dog")
        assert 'running_lora_adapters="cat,org/dog"' in state.metrics.text().decode()
    assert state.held_adapters == ()
    assert "lora_requests_info" not in ServerState().metrics.text().decode()


def test_a_name_is_looked_for_when_the_model_is_there() -> None:
    # Which adapters there are is known then; a client that waits will find its adapter.
    state = ServerState(ServerConfig(model_names=("base",)))
    answer = call(state, "POST", "/v1/chat/completions", json={"messages": HELLO, "model": "cat"})
    assert answer.status_code == 503


# ---- over a real engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSource, ...]:
    folder = tmp_path_factory.mktemp("adapters")
    return tuple(
        LoraSource(name, make_lora(folder / name, tiny_config(), seed=seed))
        for seed, name in enumerate(("cat", "dog"))
    )


@asynccontextmanager
async def serving(model: Path, config: EngineConfig) -> AsyncGenerator[httpx.AsyncClient]:
    engine = await asyncio.to_thread(create_engine, model, config)
    transport = httpx.ASGITransport(create_app(ServerState(ServerConfig(), engine)))
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60) as client:
        yield client
    check_empty(engine)
    await engine.close()


async def completion(client: httpx.AsyncClient, name: str, **fields: Any) -> dict[str, Any]:
    body = {"model": name, "prompt": list(range(1000, 1100)), "max_tokens": 8, "temperature": 0, **fields}
    answer = await client.post("/v1/completions", json={**body, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return {**choice, "cached": answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]}


def test_adapters_by_name_mixed_in_one_batch_answer_as_alone(
    model: Path, sources: tuple[LoraSource, ...]
) -> None:
    names = ("tiny", "cat", "dog")

    async def run() -> None:
        config = EngineConfig(context_length=512, threads=1, lora=sources, max_sequences=8)
        async with serving(model, config) as client:
            first = [await completion(client, name) for name in names]
            assert [choice["cached"] for choice in first] == [0, 0, 0]
            assert len({tuple(choice["token_ids"]) for choice in first}) == 3
            together = await asyncio.gather(*(completion(client, name) for name in names * 2))
            assert [c["token_ids"] for c in together] == [c["token_ids"] for c in first * 2]
            assert all(choice["cached"] == 96 for choice in together)
            # The prompt's own log-probabilities are the adapter's too.
            echoed = [await completion(client, name, echo=True, logprobs=1) for name in names]
            scores = {tuple(choice["logprobs"]["token_logprobs"][1:50]) for choice in echoed}
            assert len(scores) == 3

    asyncio.run(run())


def test_a_turn_of_an_adapter_keeps_to_the_grammar(model: Path, sources: tuple[LoraSource, ...]) -> None:
    build_grammar_tokenizer()  # it would count towards the time that a schema may take

    async def run() -> None:
        config = EngineConfig(context_length=1024, threads=1, lora=sources)
        async with serving(model, config) as client:
            schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
            schema["additionalProperties"] = False
            body = {
                "model": "dog",
                "messages": HELLO,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                "max_reasoning_tokens": 5,
                "max_tokens": 200,
                "seed": 3,
            }
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            assert answer["model"] == "dog"
            assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)

    asyncio.run(run())


# ---- while it serves


def test_adapters_are_loaded_and_removed_where_that_is_allowed(
    model: Path, sources: tuple[LoraSource, ...], tmp_path: Path
) -> None:
    cat = {"lora_name": "cat", "lora_path": str(sources[0].path)}

    async def run() -> None:
        engine = await asyncio.to_thread(create_engine, model, EngineConfig(context_length=512, threads=1))
        state = ServerState(ServerConfig(allows_adapter_updates=True), engine)
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60) as client:

            async def post(path: str, body: dict[str, Any]) -> httpx.Response:
                return await client.post(f"/v1/{path}_lora_adapter", json=body)

            plain = await completion(client, "tiny")
            for _ in range(2):
                assert (await post("unload", {"lora_name": "cat"})).status_code == 404
                loaded = await post("load", cat)
                assert loaded.status_code == 200, loaded.text
                assert loaded.text == "Success: LoRA adapter 'cat' added successfully."
                assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["tiny", "cat"]
                tuned = await completion(client, "cat")
                assert tuned["token_ids"] != plain["token_ids"]
                again = await post("load", cat)
                assert again.status_code == 400 and "there is an adapter 'cat' already" in again.text
                removed = await post("unload", {"lora_name": "cat", "lora_int_id": 1})
                assert removed.text == "Success: LoRA adapter 'cat' removed successfully."
                gone = await client.post("/v1/completions", json={"model": "cat", "prompt": "x"})
                assert gone.status_code == 404
            for body, message in (
                ({**cat, "lora_path": str(tmp_path / "no")}, "does not exist"),
                ({**cat, "lora_path": str(tmp_path)}, "lora_path holds no adapter for this model"),
                ({**cat, "lora_path": ""}, "lora_path is empty"),
                ({**cat, "lora_name": "tiny"}, "lora_name is 'tiny', the model's own"),
                ({**cat, "lora_name": "a b"}, "adapter name is 'a b'"),
                ({"lora_name": "cat"}, "lora_path"),
                ({**cat, "lora_path": 5}, "lora_path"),
                ({**cat, "lora_path": "x\0y"}, "does not exist"),
            ):
                refused = await post("load", body)
                assert refused.status_code == 400 and message in refused.text, refused.text
        await engine.close()

    asyncio.run(run())


def test_adapters_are_not_changed_unless_the_operator_allows_it() -> None:
    for path in ("load", "unload"):
        answer = call(make_state(), "POST", f"/v1/{path}_lora_adapter", json={"lora_name": "cat"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "adapter_updates_not_allowed"
    scripted = make_state(allows_adapter_updates=True)
    body = {"lora_name": "x", "lora_path": "y"}
    answer = call(scripted, "POST", "/v1/load_lora_adapter", json=body)
    assert answer.status_code == 400 and "this engine takes no adapters" in answer.text
    loading = ServerState(ServerConfig(allows_adapter_updates=True))
    assert call(loading, "POST", "/v1/load_lora_adapter", json=body).status_code == 503


# ---- at start


def _server(state: ServerState) -> Any:
    """What the making of an engine uses of a server."""
    return SimpleNamespace(state=state, fail=None)


def test_an_adapter_that_has_the_models_name_is_refused(model: Path, tmp_path: Path) -> None:
    from harmonium.server.serve import _make_engine

    config = EngineConfig(lora=(LoraSource("tiny", tmp_path),))
    with pytest.raises(ConfigError, match="adapter 'tiny' has the name of the model"):
        asyncio.run(_make_engine(_server(ServerState()), str(model), config))
    named = ServerState(ServerConfig(model_names=("cat",)))
    config = EngineConfig(lora=(LoraSource("cat", tmp_path),))
    with pytest.raises(ConfigError, match="adapter 'cat' has the name of the model"):
        asyncio.run(_make_engine(_server(named), str(model), config))


def test_a_script_takes_no_adapter(tmp_path: Path) -> None:
    from harmonium.server.serve import _make_engine

    config = EngineConfig(lora=(LoraSource("cat", tmp_path),))
    with pytest.raises(ConfigError, match="--lora is given with --engine script:FILE"):
        asyncio.run(_make_engine(_server(ServerState()), tmp_path / "x", config))


def options(*words: str) -> argparse.Namespace:
    from harmonium.options import parse

    return parse(["serve", "MODEL", *words])


def test_options_of_ours_and_of_vllm_name_the_same_adapters(tmp_path: Path) -> None:
    from harmonium.options import engine_config

    ours = options("--lora", "a=x/1", "--lora", "b=y", "--lora", "z/c")
    theirs = options("--enable-lora", "--max-lora-rank", "64", "--lora-modules", "a=x/1", "b=y", "c=z/c")
    for arguments in (ours, theirs):
        arguments.max_sequences = 4
    expected = (LoraSource("a", Path("x/1")), LoraSource("b", Path("y")), LoraSource("c", Path("z/c")))
    assert engine_config(ours).lora == engine_config(theirs).lora == expected
    assert len(theirs.told) == 2
    for wrong in ("a=", ""):
        arguments = options("--lora", wrong)
        arguments.max_sequences = 4
        with pytest.raises(ConfigError, match="expected NAME=DIR"):
            engine_config(arguments)
