"""What else a person does with the page, in a headless Chromium: tools, settings, errors, the keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from harmonium.engine.protocol import EngineInfo
from harmonium.engine.scripted import ScriptedEngine
from harmonium.harmony.vocabulary import VOCABULARY_SIZE
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen
from tests.server.client import engine_of, make_state, prompt_text
from tests.server.live import served

CALL = (
    "<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"city":"<b>Oslo</b>"}<|call|>'
)
ANSWER = "<|channel|>final<|message|>It is 22 degrees.<|return|>"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
IS_DONE = "!!document.querySelector('.answer') && !document.querySelector('.answer.running')"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("websockets", reason="websockets is not installed")
    from tests.server.chromium import chromium, find_chromium

    path = find_chromium()
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with chromium(path) as opened:
        yield opened


def type_into(page: Any, selector: str, text: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).focus()")
    page.type(text)


def send(page: Any, text: str) -> None:
    type_into(page, "#prompt", text)
    page.press("Enter")


def stored(page: Any) -> list[dict[str, Any]]:
    """The conversations that the browser keeps."""
    found = page.run(
        "Object.keys(localStorage).filter(k => k.startsWith('harmonium.conversation.'))"
        ".map(k => JSON.parse(localStorage.getItem(k)))"
    )
    assert isinstance(found, list)
    return found


def test_call_is_shown_as_text_and_its_result_goes_back_to_the_model(browser: Any) -> None:
    state = make_state(CALL, ANSWER)
    with served(state) as url:
        page = browser.open(url)
        page.click("#open-settings")
        type_into(page, "#set-tools", json.dumps(TOOLS))
        page.click("#settings-form .primary")
        send(page, "Weather?")
        page.wait("!!document.querySelector('.call.open')")
        assert "get_weather" in page.text(".call") and "<b>Oslo</b>" in page.text(".call")
        assert page.run("document.querySelectorAll('.call b').length") == 0
        type_into(page, ".result-form textarea", '{"degrees": 22}')
        page.press("Enter")
        page.wait(f"document.querySelectorAll('.answer').length === 2 && {IS_DONE}")
        assert "It is 22 degrees." in page.text("#messages")
        text = prompt_text(state)
        assert text.index("THOUGHT") < text.index("<b>Oslo</b>") < text.index('{"degrees": 22}')
        assert page.complaints() == []


def test_message_may_follow_a_call_that_nobody_answered(browser: Any) -> None:
    state = make_state(CALL, ANSWER)
    with served(state) as url:
        page = browser.open(url)
        settings = json.dumps({"tools": json.dumps(TOOLS)})
        page.run(f"localStorage.setItem('harmonium.settings', {json.dumps(settings)})")
        page.reload()
        send(page, "Weather?")
        page.wait("!!document.querySelector('.call.open')")
        send(page, "Never mind")
        page.wait(f"document.querySelectorAll('.answer').length === 2 && {IS_DONE}")
        assert "It is 22 degrees." in page.text("#messages") and "not answered" in page.text(".call")


def test_settings_and_effort_reach_the_model_and_wrong_ones_are_named(browser: Any) -> None:
    state = make_state(ANSWER)
    with served(state) as url:
        page = browser.open(url)
        page.click("#effort input[value=high]")
        page.click("#open-settings")
        type_into(page, "#set-temperature", "7")
        page.click("#settings-form .primary")
        assert "0 to 2" in page.text("#settings-error")
        page.run("document.querySelector('#set-temperature').value = '0.5'")
        type_into(page, "#set-system", "Be brief.")
        type_into(page, "#set-max-tokens", "100")
        page.click("#settings-form .primary")
        page.wait("!document.querySelector('#settings').open")
        send(page, "Hello")
        page.wait(IS_DONE)
        sampling = engine_of(state).requests[-1].sampling
        assert (sampling.temperature, sampling.max_tokens) == (0.5, 100)
        assert "Be brief." in prompt_text(state) and "Reasoning: high" in prompt_text(state)


def test_missing_key_is_asked_for_and_kept_in_the_tab_alone(browser: Any) -> None:
    with served(make_state(ANSWER, api_keys=("sk-one",))) as url:
        page = browser.open(url)
        send(page, "Hello")
        page.wait("!!document.querySelector('.failure button')")
        page.click(".failure button")
        assert page.run("document.activeElement.id") == "set-key"
        page.type("sk-one")
        page.press("Enter")
        page.wait("!document.querySelector('#settings').open")
        page.click(".answer-foot .foot-button")
        page.wait("document.querySelector('#messages').innerText.includes('22 degrees')")
        assert "sk-one" not in page.run("JSON.stringify(localStorage)")
        assert "sk-one" in page.run("JSON.stringify(sessionStorage)")


def test_loading_is_shown_until_the_server_is_ready(browser: Any) -> None:
    state = ServerState(ServerConfig())
    with served(state) as url:
        page = browser.open(url)
        page.wait("document.querySelector('#banner').innerText.includes('loading')")
        send(page, "Hello")
        page.wait("document.querySelector('#messages').innerText.includes('still loading')")
        state.set_engine(ScriptedEngine([gen(ANSWER)]))
        page.wait("document.querySelector('#banner').hidden")
        page.click(".failure button")
        page.wait("document.querySelector('#messages').innerText.includes('22 degrees')")


def test_full_context_offers_a_new_chat(browser: Any) -> None:
    info = EngineInfo("small", 100, VOCABULARY_SIZE, engine="scripted")
    state = ServerState(ServerConfig(), ScriptedEngine([gen(ANSWER)], info=info))
    with served(state) as url:
        page = browser.open(url)
        send(page, "word " * 200)
        page.wait("!!document.querySelector('.failure button')")
        assert "longer than what the model can read" in page.text(".failure")
        page.click(".failure button")
        assert page.text("#messages") == "" and page.text("#title") == "New chat"


def test_conversation_is_renamed_deleted_and_brought_back(browser: Any) -> None:
    with served(make_state(ANSWER)) as url:
        page = browser.open(url)
        send(page, "Hello")
        page.wait(IS_DONE)
        page.click(".row [aria-label^=Rename]")
        page.run("document.querySelector('.rename').select()")
        page.type("Greetings")
        page.press("Enter")
        assert page.text("#title") == "Greetings" and stored(page)[0]["title"] == "Greetings"
        page.click(".row [aria-label^=Delete]")
        assert stored(page) == [] and page.text("#messages") == ""
        page.click("#toast button")
        assert stored(page)[0]["messages"][0] == {"role": "user", "content": "Hello"}
        assert page.text(".row-title") == "Greetings"


def test_page_can_be_used_by_keyboard_and_is_named_for_screen_readers(browser: Any) -> None:
    answer = "<|channel|>final<|message|>One is here. Two is here. Three<|return|>"
    engine = ScriptedEngine(
        [gen("<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant" + answer)],
        seconds_per_event=0.03,  # so that sentences come in more than one frame
    )
    with served(ServerState(ServerConfig(), engine)) as url:
        page = browser.open(url)
        type_into(page, "#prompt", "one")
        page.press("Enter", modifiers=8)  # Shift: a line break
        page.type("two")
        page.press("Enter")
        page.wait(IS_DONE)
        assert page.text(".bubble") == "one\ntwo"
        page.run("document.querySelector('summary').focus()")
        page.press("Enter")
        page.wait("document.querySelector('.reasoning-text').innerText.includes('THOUGHT')")
        said = page.run("[...document.querySelector('#spoken').children].map(p => p.textContent)")
        assert said == ["One is here.", "Two is here.", "Three", "The answer is complete"]
        nameless = page.run(
            "[...document.querySelectorAll('button, input, textarea, select')].filter(e => !("
            "e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
        )
        assert nameless == []


HOSTILE = (
    "*a",
    "**",
    "`",
    "[",
    "[a](",
    "![",
    "<http://a",
    "> ",
    "- ",
    "| - ",
    "\\(",
    "_a*b",
    "# #",
    "~~",
    "  - x\n",
)


def test_hostile_markdown_takes_linear_time(browser: Any) -> None:
    """50,000 repeats each: a piece that is looked at again for each other one takes far longer.

    The thread's own time is counted, which no other load of the machine lengthens.
    """
    with served(make_state(ANSWER)) as url:
        page = browser.open(url)
        page.call("Performance.enable", timeDomain="threadTicks")
        page.run("import('/page/markdown.js').then(module => { window.View = module.MarkdownView; })")
        for piece in HOSTILE:
            before = thread_seconds(page)
            page.run(f"new View(document.createElement('div')).update({json.dumps(piece)}.repeat(50000))")
            took = thread_seconds(page) - before
            assert took < 5, piece


def thread_seconds(page: Any) -> float:
    """CPU time that the page's thread has spent in tasks."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))
