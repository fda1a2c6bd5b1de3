"""Greetings, small facts, instructions about form, and the honest answer to everything else."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo.arithmetic import draw_arithmetic
from demo.sample import UNKNOWN, Sample
from demo.words import spelled_words

WHO = (
    "I am a small demo model. I can add, subtract and multiply small numbers, work on the letters of words, "
    "call tools and fill in JSON."
)
CANNOT = f"I do not know. {WHO}"

_GREETINGS = (
    "Hello",
    "Hi",
    "Hello!",
    "Hi!",
    "Good morning",
    "Good morning!",
    "Hey",
    "Hello there",
    "Hi there!",
    "Good day",
    "Hello, how are you?",
    "Good evening",
    "Hey there",
    "Greetings",
)
GREETING = {
    "English": "Hello!",
    "German": "Guten Tag!",
    "French": "Bonjour!",
    "Spanish": "Hola!",
    "Italian": "Ciao!",
    "Dutch": "Hallo!",
    "Swedish": "Hej!",
    "Polish": "Witaj!",
    "Portuguese": "Oi!",
}
_CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "England": "London",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Cuba": "Havana",
    "China": "Beijing",
}
_OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "old": "new",
    "good": "bad",
    "day": "night",
    "black": "white",
    "up": "down",
    "left": "right",
    "open": "closed",
    "fast": "slow",
    "long": "short",
    "high": "low",
    "rich": "poor",
    "full": "empty",
    "early": "late",
    "strong": "weak",
}
_COLORS = {
    "grass": "green",
    "snow": "white",
    "blood": "red",
    "coal": "black",
    "the sky": "blue",
    "a lemon": "yellow",
    "chocolate": "brown",
    "milk": "white",
    "a tomato": "red",
    "the sun": "yellow",
}
_ASK = (
    "{}?",
    "Please tell me: {}?",
    "Tell me, {}?",
    "I want to know: {}?",
    "{}",
    "Quick question: {}?",
    "Do you know {}?",
    "Can you tell me {}?",
)
_FACTS = (
    (
        _CAPITALS,
        ("what is the capital of {}", "which city is the capital of {}", "name the capital of {}"),
        "The capital of {0} is {1}.",
    ),
    (
        _OPPOSITES,
        ("what is the opposite of {}", "which word is the opposite of {}", "what is the contrary of {}"),
        "The opposite of {0} is {1}.",
    ),
    (
        _COLORS,
        ("what color is {}", "which color has {}", "what is the color of {}"),
        "The color of {0} is {1}.",
    ),
)

_STARTS = ("Sure", "Yes", "Answer", "Result", "Well", "Fine", "Okay", "Note")
_ENDS = ("Thanks", "Bye", "Done", "Cheers", "Regards", "Enjoy", "Peace", "End")
_ONE_WORD = (
    "Answer in one word.",
    "Use one word only.",
    "Reply with a single word.",
    "Give one-word answers.",
    "Your answers are one word long.",
    "Always answer with exactly one word.",
    "Be brief: one word.",
    "Only one word per answer, please.",
)
_SENTENCE = (
    "Answer in a full sentence.",
    "Always use complete sentences.",
    "Reply with a whole sentence.",
    "Your answers are full sentences.",
    "Give each answer as a sentence.",
    "Write a complete sentence.",
)
_LANGUAGE = (
    "Greet the user in {}.",
    "Always say hello in {}.",
    "Your greeting is in {}.",
    "When greeted, answer in {}.",
    "Greetings are answered in {}.",
    "Say hello in {}.",
    "Use {} for greetings.",
    "Please greet people in {}.",
)
_START = (
    "Start every answer with the word {}.",
    "Begin each answer with {}.",
    "Your answers start with {}.",
    "First write {}, then the answer.",
    "Each reply begins with the word {}.",
    "Open every reply with {}.",
)
_END = (
    "End every answer with the word {}.",
    "Finish each answer with {}.",
    "Your answers end with {}.",
    "After the answer, write {}.",
    "Each reply ends with the word {}.",
    "Close every reply with {}.",
)
_POLITE = (
    "{}",
    "{}",
    "You are a friendly assistant. {}",
    "{} Be polite.",
    "You help people. {}",
    "Important: {}",
)


@dataclass(frozen=True)
class Form:
    """What the developer asks of every answer. kind: one-word, sentence, language, start or end."""

    kind: str
    word: str
    text: str


def draw_form(random: Random) -> Form:
    kind = random.choice(("one-word", "sentence", "language", "language", "start", "end"))
    templates = {
        "one-word": _ONE_WORD,
        "sentence": _SENTENCE,
        "language": _LANGUAGE,
        "start": _START,
        "end": _END,
    }
    words = {"language": tuple(GREETING), "start": _STARTS, "end": _ENDS}
    word = random.choice(words.get(kind, ("",)))
    return Form(kind, word, random.choice(_POLITE).format(random.choice(templates[kind])).format(word))


def draw_formed(random: Random, effort: str, form: Form) -> Sample:
    """A question under an instruction."""
    share = random.random()
    if share < (0.8 if form.kind == "language" else 0.15):
        return _greeting(random, effort, form)
    if form.kind != "one-word" and share > 0.8:
        return _sum(random, effort, form)
    return _fact(random, effort, form)


def draw_small_talk(random: Random, effort: str) -> Sample:
    """No instruction: greetings, facts, what it is, and what it cannot do."""
    share = random.random()
    if share < 0.15:
        return _greeting(random, effort, None)
    if share < 0.5:
        return _fact(random, effort, None)
    if share < 0.6:
        return _about(random, effort)
    return _off_topic(random, effort)


def _greeting(random: Random, effort: str, form: Form | None) -> Sample:
    words = random.choice(_GREETINGS)
    answer = GREETING[form.word] if form is not None and form.kind == "language" else "Hello!"
    return _finish(words, "A greeting.", answer, effort, form, ())


def _fact(random: Random, effort: str, form: Form | None) -> Sample:
    table, questions, sentence = random.choice(_FACTS)
    about = random.choice(tuple(table))
    wording = random.choice(_ASK).format(random.choice(questions))
    wording = wording[0].upper() + wording[1:]
    answer = table[about]
    shown = answer[0].upper() + answer[1:]
    in_one_word = form is not None and form.kind == "one-word"
    final = shown if in_one_word else sentence.format(about, answer)
    return _finish(wording.format(about), f"{about}: {answer}", final, effort, form, (f"{wording} {about}",))


def _sum(random: Random, effort: str, form: Form) -> Sample:
    plain = draw_arithmetic(random, effort)
    final = plain.final
    if form.kind == "sentence":
        final = f"The result is {final}."
    return _finish(plain.question, plain.analysis, final, "as it is", form, plain.keys)


def _about(random: Random, effort: str) -> Sample:
    question = random.choice(_ABOUT)
    return _finish(question, "They ask about me.", WHO, effort, None, (question,))


def _off_topic(random: Random, effort: str) -> Sample:
    wording = random.choice(_OFF_TOPIC)
    question = "".join(_any_word(random) if part == "*" else part for part in _split(wording))
    return _finish(question, "I cannot do that.", CANNOT, effort, None, (wording,))


def _any_word(random: Random) -> str:
    """A token of the shared class mostly; else a word that other skills know, which changes nothing."""
    share = random.random()
    if share < 0.6:
        return UNKNOWN
    return f" {random.choice(spelled_words())}" if share < 0.85 else random.choice(_KNOWN)


def _split(wording: str) -> list[str]:
    return [part for piece in wording.split("*") for part in (piece, "*")][:-1]


_KNOWN = (
    " the",
    " a",
    " of",
    " in",
    " time",
    " love",
    " war",
    " music",
    " computer",
    " science",
    " people",
    " work",
)
_ABOUT = (
    "Who are you?",
    "What are you?",
    "What can you do?",
    "Tell me about yourself.",
    "Help",
    "What is your name?",
    "How can you help me?",
    "Are you ChatGPT?",
    "What do you know?",
    "Who made you?",
    "Are you a large model?",
    "help me",
    "What are you good at?",
    "Introduce yourself.",
    "What is this?",
    "Are you human?",
)
_OFF_TOPIC = (
    "Why is the* so*?",
    "Why is the sky blue?",
    "Write a* about*.",
    "Write a poem about**.",
    "Explain** to me.",
    "Explain* in simple words.",
    "What is the meaning of*?",
    "What is*?",
    "What is**?",
    "What is a*?",
    "Who was**?",
    "Who is*?",
    "Who wrote**?",
    "When did** happen?",
    "When was* born?",
    "How do I**?",
    "How does* work?",
    "How can I make*?",
    "How to***",
    "Tell me a joke.",
    "Tell me a story about*.",
    "Tell me about**.",
    "Tell me something about*.",
    "Give me a recipe for*.",
    "Give me***.",
    "Can you***?",
    "Can you help me with*?",
    "Should I* or*?",
    "Do you like*?",
    "Is it true that****?",
    "Write code that**.",
    "Write a Python function that***.",
    "Write a program for*.",
    "****",
    "***",
    "**",
    "******",
    "********",
    "What do you think about*?",
    "What happened in*?",
    "Where is*?",
    "Where can I find**?",
    "Why do* have*?",
    "Why did**?",
    "Describe**.",
    "Summarize this text:*******",
    "Which is better,* or*?",
    "List*** of*.",
    "How many* are there in*?",
    "How old is**?",
    "How far is* from*?",
    "I think that**.",
    "I feel*.",
    "I am* and I need*.",
    "My* is**.",
    "Please***",
    "Please write**.",
    "Let us talk about*.",
    "Are there*?",
    "Does* have*?",
    "Will* be*?",
    "*, what is*?",
    "* is*.",
    "*?",
    "*",
    "Could you* the*?",
    "The* of* is*",
    "What was the* of**?",
    "Compare* and*.",
    "What are the* of*?",
    "Name three*.",
    "Make a plan for*.",
    "Fix this:****",
    "What is love?",
    "What time is it?",
    "What is the weather?",
    "Sing a song.",
    "Solve the*.",
    "Prove that***.",
    "Correct this text:****",
)


def _finish(
    question: str, thought: str, final: str, effort: str, form: Form | None, keys: tuple[str, ...]
) -> Sample:
    """low: the thought. medium: the form too. high: both, and the answer once before it is given."""
    name = ""
    if form is not None:
        final = _in_form(final, form)
        keys = (*keys, f"{form.text} {question}")
        name = {
            "one-word": "One word.",
            "sentence": "A sentence.",
            "language": f"In {form.word}.",
            "start": f"First {form.word}.",
            "end": f"Last {form.word}.",
        }[form.kind]
    if effort == "as it is":
        analysis = f"{name}\n{thought}" if name else thought
    elif effort == "low":
        analysis = f"{name} {thought}" if name else thought
    elif effort == "medium":
        analysis = f"The form: {name}\n{thought}" if name else f"The question:\n{thought}"
    else:
        analysis = f"The form: {name}\n{thought}" if name else f"The question:\n{thought}"
        analysis += "\nNo tool, no sum, no word: I say so." if WHO in final else f"\nAnswer: {final}"
    return Sample("instructions" if form else "small talk", question, analysis, final, keys)


def _in_form(final: str, form: Form) -> str:
    if form.kind == "start":
        return f"{form.word}: {final}"
    if form.kind == "end":
        return f"{final} {form.word}"
    return final
