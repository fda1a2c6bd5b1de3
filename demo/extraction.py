"""Reading the fields of a JSON schema out of a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from demo.sample import Sample, compact_json
from demo.words import draw_value
from harmonium.harmony.messages import ResponseFormat


@dataclass(frozen=True)
class Field:
    """names: what a schema may call it. clauses: how a text says it."""

    names: tuple[str, ...]
    kind: str
    clauses: tuple[str, ...]
    most: int = 0


@dataclass(frozen=True)
class Topic:
    names: tuple[str, ...]
    subject: Field
    fields: tuple[Field, ...]


_AGE = Field(("age", "years"), "number", ("is {} years old", "is {}", "turned {} last week"), 99)
TOPICS = (
    Topic(
        ("person", "contact"),
        Field(("name", "person"), "name", ("My friend {}", "{}", "This is {}. {0}")),
        (
            _AGE,
            Field(("city", "town"), "city", ("lives in {}", "comes from {}", "has a house in {}")),
            Field(("job", "profession"), "job", ("works as a {}", "is a {}", "wants to be a {}")),
            Field(("language", "speaks"), "language", ("speaks {}", "is learning {}")),
        ),
    ),
    Topic(
        ("order", "purchase"),
        Field(("customer", "name"), "name", ("{}", "The customer {}", "Our client {}")),
        (
            Field(("item", "product"), "item", ("wants a {}", "ordered a {}", "asked for a {}")),
            Field(
                ("color", "shade"), "color", ("likes it in {}", "chose the color {}", "asked for {} paint")
            ),
            Field(
                ("price", "cost"),
                "number",
                ("pays {} dollars", "paid ${}", "has a budget of {} dollars"),
                999,
            ),
            Field(("day", "date"), "day", ("needs it on {}", "will come on {}", "called on {}")),
        ),
    ),
    Topic(
        ("pet", "animal"),
        Field(("owner", "name"), "name", ("{}", "Our neighbor {}", "My friend {}")),
        (
            Field(("animal", "pet"), "animal", ("has a {}", "owns a {}", "bought a {}")),
            Field(("color", "fur"), "color", ("loves its {} fur", "painted its house {}")),
            Field(
                ("weight", "size"), "number", ("says it weighs {} pounds", "gives it {} grams of food"), 300
            ),
            Field(("city", "place"), "city", ("lives in {}", "moved to {}")),
        ),
    ),
    Topic(
        ("trip", "travel"),
        Field(("traveler", "name"), "name", ("{}", "My colleague {}", "Our guest {}")),
        (
            Field(("destination", "city"), "city", ("flies to {}", "takes the train to {}", "goes to {}")),
            Field(("month", "time"), "month", ("leaves in {}", "starts in {}")),
            Field(("days", "nights"), "number", ("stays for {} days", "has {} days off"), 30),
            Field(("price", "cost"), "number", ("pays {} euros", "spends {} dollars"), 999),
        ),
    ),
    Topic(
        ("event", "meeting"),
        Field(("host", "name"), "name", ("{}", "The host {}", "Our boss {}")),
        (
            Field(("day", "date"), "day", ("gives a party on {}", "invites us on {}")),
            Field(("room", "place"), "room", ("takes the {}", "prepares the {}")),
            Field(("guests", "people"), "number", ("expects {} guests", "invited {} people"), 200),
            Field(("food", "dish"), "dish", ("serves {}", "will make {}")),
            Field(("music", "genre"), "genre", ("plays {} music", "likes {} music")),
        ),
    ),
)
_ASK = (
    "{}",
    "Extract the data: {}",
    "Text: {}",
    "Read this: {}",
    "{} Extract the fields.",
    "Fill in the form: {}",
    "Please extract the information from this text: {}",
    "Here is a note. {}",
    "{} Give me the JSON.",
)
_JOIN = (" and ", ", ", ". Also, {0} ")


@dataclass(frozen=True)
class Form:
    """A schema: a topic, and the fields asked for in the order of the schema."""

    topic: Topic
    name: str
    fields: tuple[tuple[str, Field], ...]

    def response_format(self) -> ResponseFormat:
        properties = {
            name: {"type": "integer" if part.kind == "number" else "string"} for name, part in self.fields
        }
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return ResponseFormat(self.name, schema)

    @property
    def key(self) -> str:
        return f"form {self.topic.names[0]} " + " ".join(part.names[0] for _, part in self.fields)


def draw_form(random: Random) -> Form:
    topic = random.choice(TOPICS)
    parts = random.sample((topic.subject, *topic.fields), random.choice((2, 3, 3, 4)))
    named: dict[str, Field] = {}
    for part in parts:
        named.setdefault(random.choice(part.names), part)
    return Form(topic, random.choice(topic.names), tuple(named.items()))


def draw_extraction(random: Random, effort: str, form: Form, is_wide: bool = False) -> Sample:
    """The text says everything that the schema asks for, and at times more."""
    asked = [part for _, part in form.fields if part is not form.topic.subject]
    others = [part for part in form.topic.fields if part not in asked]
    told = asked + random.sample(others, min(len(others), random.choice((0, 0, 1, 1, 2))))
    random.shuffle(told)
    facts = _facts(random, (form.topic.subject, *told), is_wide)
    text, wording = _text(random, form.topic.subject, told, facts)
    answer = {name: facts[part.names[0]] for name, part in form.fields}
    keys = (wording, form.key, f"facts {compact_json(answer)}")
    return Sample("extraction", text, _thought(answer, effort), compact_json(answer), keys)


def _facts(random: Random, parts: tuple[Field, ...], is_wide: bool) -> dict[str, Any]:
    """No value twice, so that each is where its clause is."""
    while True:
        facts: dict[str, Any] = {}
        for part in parts:
            number = part.kind == "number"
            facts[part.names[0]] = (
                random.randint(1, part.most) if number else draw_value(random, part.kind, is_wide)
            )
        if len(set(map(str, facts.values()))) == len(facts):
            return facts


def _text(random: Random, subject: Field, told: list[Field], facts: Mapping[str, Any]) -> tuple[str, str]:
    """The text, and its wording without the values."""
    ask = random.choice(_ASK)
    start = random.choice(subject.clauses)
    wording, text = start, start.format(facts[subject.names[0]]) if "{0}" not in start else ""
    if not text:
        start = start.replace("{0}", "{}")
        wording, text = start, start.format(facts[subject.names[0]], facts[subject.names[0]])
    for index, part in enumerate(told):
        clause = random.choice(part.clauses)
        joint = " " if index == 0 else random.choice(_JOIN)
        wording += joint + clause
        text += joint.format(facts[subject.names[0]]) + clause.format(facts[part.names[0]])
    return ask.format(text + "."), ask + wording


def _thought(answer: Mapping[str, Any], effort: str) -> str:
    """low: the fields. medium: fields with values. high: both."""
    names = ", ".join(answer)
    listed = "\n".join(f"{name} {value}" for name, value in answer.items())
    return {
        "low": f"Fields: {names}.",
        "medium": listed,
        "high": f"Fields: {names}.\n{listed}\n{compact_json(answer)}",
    }[effort]
