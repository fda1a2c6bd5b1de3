"""The API's tests, once over the engine that they make and once over `--engine vllm=` in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.remote_states import StubServer, remote_states

OVER_VLLM = frozenset(
    {
        "test_anthropic_client",
        "test_chat_faults",
        "test_chat_grammar",
        "test_completions",
        "test_disconnect",
        "test_fault_variations",
        "test_messages",
        "test_messages_faults",
        "test_openai_client",
        "test_responses",
        "test_responses_client",
        "test_responses_faults",
        "test_responses_grammar",
        "test_responses_run",
        "test_responses_tools",
    }
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition(".")[2]
    if name in OVER_VLLM:
        metafunc.parametrize("engine_kind", ["own", "vllm"], indirect=True)


@pytest.fixture(scope="session")
def stub_server() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def engine_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "own": the engine that the test makes. "vllm": vLLM's protocol lies between it and the server."""
    kind: str = getattr(request, "param", "own")
    if kind == "vllm":
        remote_states(monkeypatch, request.getfixturevalue("stub_server"))
    return kind
