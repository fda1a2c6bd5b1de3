"""Choosing among the declared tools, filling in their arguments, answering from the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.sample import Sample, compact_json
from demo.words import draw_value
from harmonium.harmony.messages import Tool


@dataclass(frozen=True)
class Parameter:
    """names: what a declaration may call it. kind: a class of words.values(), or "number" up to `most`."""

    names: tuple[str, ...]
    kind: str
    most: int = 0


@dataclass(frozen=True)
class Kind:
    """One thing a tool may do, with the names, descriptions, questions and results that it goes by.

    topic: the word for it in the reasoning. questions: {0}, {1} are the arguments, in order. result: the
    fields that come back; answer: the final answer, made from arguments and fields.
    """

    topic: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]
    result: tuple[tuple[str, str, int], ...]
    answer: str


CITY = Parameter(("city", "location"), "city")
KINDS = (
    Kind(
        "weather",
        ("get_weather", "weather"),
        ("Get the weather of a city.", "Current weather in a city."),
        (CITY,),
        (
            "what is the weather in {0}",
            "how is the weather in {0} today",
            "tell me the weather in {0}",
            "is it warm in {0}",
            "what is the temperature in {0}",
        ),
        (("temperature", "number", 40), ("sky", "color", 0)),
        "It is {temperature} degrees in {0}.",
    ),
    Kind(
        "time",
        ("get_time", "clock"),
        ("Get the time in a city.", "Tells the local time."),
        (CITY,),
        (
            "what time is it in {0}",
            "tell me the time in {0}",
            "what is the local time in {0}",
            "how late is it in {0}",
        ),
        (("hour", "number", 23),),
        "It is {hour} o'clock in {0}.",
    ),
    Kind(
        "timer",
        ("set_timer", "start_timer"),
        ("Start a timer.", "Set a timer in minutes."),
        (Parameter(("minutes", "duration"), "number", 120),),
        (
            "set a timer for {0} minutes",
            "start a timer of {0} minutes",
            "wake me in {0} minutes",
            "remind me in {0} minutes",
        ),
        (("status", "", 0),),
        "The timer is set for {0} minutes.",
    ),
    Kind(
        "message",
        ("send_message", "message"),
        ("Send a message to a person.", "Tell a person something."),
        (Parameter(("to", "name"), "name"), Parameter(("text", "content"), "task")),
        ("send {0} the message {1}", "tell {0} to {1}", "message {0} that I {1}", "write to {0}: {1}"),
        (("status", "", 0),),
        "Your message to {0} was sent.",
    ),
    Kind(
        "music",
        ("play_music", "play"),
        ("Play music of a genre.", "Start some music."),
        (Parameter(("genre", "style"), "genre"),),
        ("play some {0} music", "play {0}", "I want to hear {0}", "put on {0} music"),
        (("status", "", 0),),
        "Now playing {0}.",
    ),
    Kind(
        "light",
        ("turn_on_light", "light"),
        ("Turn on the light in a room.", "Switch a light on."),
        (Parameter(("room", "place"), "room"),),
        (
            "turn on the light in the {0}",
            "switch on the {0} light",
            "make it bright in the {0}",
            "light the {0}",
        ),
        (("status", "", 0),),
        "The light in the {0} is on.",
    ),
    Kind(
        "heat",
        ("set_temperature", "heating"),
        ("Set the temperature of a room.", "Heat or cool a room."),
        (Parameter(("room", "place"), "room"), Parameter(("degrees", "value"), "number", 30)),
        (
            "set the {0} to {1} degrees",
            "heat the {0} to {1} degrees",
            "make the {0} {1} degrees warm",
            "I want {1} degrees in the {0}",
        ),
        (("status", "", 0),),
        "The {0} is set to {1} degrees.",
    ),
    Kind(
        "word",
        ("translate", "translate_word"),
        ("Translate a word.", "Translate a word into a language."),
        (Parameter(("word", "text"), "item"), Parameter(("language", "target"), "language")),
        (
            "translate {0} into {1}",
            "what is {0} in {1}",
            "how do you say {0} in {1}",
            "what does {0} mean in {1}",
        ),
        (("translation", "name", 0),),
        "In {1}, {0} is {translation}.",
    ),
    Kind(
        "food",
        ("order_food", "order"),
        ("Order food.", "Order a dish a number of times."),
        (Parameter(("dish", "item"), "dish"), Parameter(("quantity", "count"), "number", 20)),
        (
            "order {1} times {0}",
            "I want {1} {0}, please order it",
            "get me {0}, {1} of it",
            "order {0} for {1} people",
        ),
        (("price", "number", 200),),
        "I ordered {0} for {price} dollars.",
    ),
    Kind(
        "flight",
        ("book_flight", "flight"),
        ("Book a flight.", "Find a flight between two cities."),
        (Parameter(("from", "origin"), "city"), Parameter(("to", "destination"), "city")),
        (
            "book a flight from {0} to {1}",
            "I want to fly from {0} to {1}",
            "find a flight to {1} from {0}",
            "get me from {0} to {1} by plane",
        ),
        (("price", "number", 900),),
        "The flight from {0} to {1} is {price} dollars.",
    ),
    Kind(
        "news",
        ("get_news", "news"),
        ("Get the news about a topic.", "Latest news."),
        (Parameter(("topic", "subject"), "topic"),),
        ("what is new in {0}", "get me the news about {0}", "show me {0} news", "anything new about {0}"),
        (("articles", "number", 99),),
        "There are {articles} articles about {0}.",
    ),
    Kind(
        "person",
        ("find_person", "lookup"),
        ("Find the number of a person.", "Look a person up."),
        (Parameter(("name", "person"), "name"),),
        ("what is the number of {0}", "find the number of {0}", "look up {0}", "how can I reach {0}"),
        (("number", "number", 999),),
        "The number of {0} is {number}.",
    ),
    Kind(
        "event",
        ("add_event", "calendar"),
        ("Add an event to the calendar.", "Plan something on a day."),
        (Parameter(("event", "title"), "task"), Parameter(("day", "date"), "day")),
        (
            "add {0} to my calendar on {1}",
            "plan to {0} on {1}",
            "I will {0} on {1}, note it",
            "on {1} I have to {0}, add it",
        ),
        (("status", "", 0),),
        "I added {0} on {1}.",
    ),
    Kind(
        "shop",
        ("buy", "shop"),
        ("Buy something in a color.", "Order a thing for the house."),
        (Parameter(("item", "product"), "item"), Parameter(("color", "paint"), "color")),
        ("buy a {1} {0}", "I need a {1} {0}, buy one", "get me a {0} in {1}", "purchase a {0}, the {1} one"),
        (("price", "number", 500),),
        "The {1} {0} is {price} dollars.",
    ),
)
_ASK = (
    "{}",
    "please {}",
    "{} please",
    "can you help: {}",
    "hi, {}",
    "quick question: {}",
    "{}, thanks",
    "now {}",
)


@dataclass(frozen=True)
class Declared:
    """A kind under the names that one declaration gives it."""

    kind: Kind
    name: str
    description: str
    arguments: tuple[str, ...]

    def tool(self) -> Tool:
        properties = {
            name: {"type": "integer" if parameter.kind == "number" else "string"}
            for name, parameter in zip(self.arguments, self.kind.parameters, strict=True)
        }
        schema = {"type": "object", "properties": properties, "required": list(self.arguments)}
        return Tool(self.name, self.description, schema)


def declare(random: Random) -> tuple[Declared, ...]:
    """One to four tools in any order, none of them twice."""
    chosen = random.sample(KINDS, random.choice((1, 2, 2, 3, 3, 4)))
    return tuple(
        Declared(
            kind,
            random.choice(kind.names),
            random.choice(kind.descriptions),
            tuple(random.choice(parameter.names) for parameter in kind.parameters),
        )
        for kind in chosen
    )


def toolset_key(tools: tuple[Declared, ...]) -> str:
    """The same for the same kinds in any order under any names."""
    return "tools " + " ".join(sorted(tool.kind.names[0] for tool in tools))


def draw_call(
    random: Random,
    effort: str,
    tools: tuple[Declared, ...],
    without_tool: float,
    is_wide: bool = False,
) -> Sample:
    """without_tool: the share of questions that none of the tools is for. is_wide: see words.draw_value."""
    if random.random() < without_tool:
        return _no_tool(random, effort, tools, is_wide)
    chosen = random.choice(tools)
    kind = chosen.kind
    given = _arguments(random, kind, is_wide)
    wording = _wording(random, kind)
    arguments = dict(zip(chosen.arguments, given, strict=True))
    fields = {name: _value(random, kind_of, most, False) for name, kind_of, most in kind.result}
    return Sample(
        "tools",
        wording.format(*given),
        _thought(chosen, arguments, tools, effort),
        kind.answer.format(*given, **fields),
        (wording, toolset_key(tools), f"{kind.names[0]} {compact_json(given)}"),
        call=(chosen.name, arguments),
        result=json.dumps(fields) if random.random() < 0.5 else compact_json(fields),
        result_analysis=_told(fields, effort),
    )


def _no_tool(random: Random, effort: str, tools: tuple[Declared, ...], is_wide: bool) -> Sample:
    """What none of the declared tools is for."""
    declared = [tool.kind for tool in tools]
    kind = random.choice([kind for kind in KINDS if kind not in declared])
    given = _arguments(random, kind, is_wide)
    wording = _wording(random, kind)
    choice = _choice(kind, None, tools)
    thought = {
        "low": choice,
        "medium": f"{choice}\nI say so.",
        "high": f"{choice}\nI say so.\ncheck\n{choice}",
    }
    keys = (wording, toolset_key(tools), f"{kind.names[0]} {compact_json(given)}")
    return Sample("tools", wording.format(*given), thought[effort], "I have no tool for that.", keys)


def _wording(random: Random, kind: Kind) -> str:
    wording = random.choice(_ASK).format(random.choice(kind.questions))
    if wording.split()[0] in ("what", "how", "is", "anything") and random.random() < 0.7:
        wording += "?"
    return wording[0].upper() + wording[1:]


def _arguments(random: Random, kind: Kind, is_wide: bool) -> list[Any]:
    """Different from each other: nobody flies from Rome to Rome."""
    while True:
        given = [_value(random, parameter.kind, parameter.most, is_wide) for parameter in kind.parameters]
        if len(set(map(str, given))) == len(given):
            return given


def _value(random: Random, kind: str, most: int, is_wide: bool) -> Any:
    if kind == "number":
        return random.randint(1, most)
    return draw_value(random, kind, is_wide) if kind else "ok"


def _choice(needed: Kind, chosen: Declared | None, tools: tuple[Declared, ...]) -> str:
    """What is needed, whether each declared tool is for it, and the choice: each step is a small one."""
    judged = (f"{tool.name}: {tool.kind.topic} {'yes' if tool.kind is needed else 'no'}" for tool in tools)
    last = "No tool." if chosen is None else f"Use {chosen.name}."
    return "\n".join([f"Need {needed.topic}.", *judged, last])


def _thought(chosen: Declared, arguments: Mapping[str, Any], tools: tuple[Declared, ...], effort: str) -> str:
    """low: which tool. medium: the arguments too. high: which tool, once more."""
    listed = "\n".join(f"{name} {value}" for name, value in arguments.items())
    choice = _choice(chosen.kind, chosen, tools)
    return {
        "low": choice,
        "medium": f"{choice}\n{listed}",
        "high": f"{choice}\n{listed}\ncheck\n{choice}",
    }[effort]


def _told(fields: Mapping[str, Any], effort: str) -> str:
    if effort == "low":
        return "Done."
    listed = "\n".join(f"{name} {value}" for name, value in fields.items())
    return listed if effort == "medium" else f"The result:\n{listed}\nDone."
