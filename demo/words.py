"""The closed lists of words that the demo model knows: one token each, with and without a blank before.

Values that tools and schemas take have to be copied from `" Paris"` in a sentence to `"Paris"` in JSON, which
are different tokens; a word that is not one token in both forms would have to be spelled.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from harmonium.harmony.vocabulary import vocabulary

MAX_LETTERS = 8

_NAMES = """
Anna Peter Maria Paul Laura David Emma Daniel Julia Thomas Sarah Martin Lisa Robert Clara Frank Helen George
Alice Simon Eva Oscar Nina Victor Sophie Henry Rosa Max Elena Felix Marie Leo Jane Adam Kate Tom Lucy Mark
Amy John Mary James Susan Karl Ben Sam Alex Michael Linda Eric Diana Hugo Ivan Jack Kim Luis Nora Olivia
Philip Ryan Sofia Tim Walter Carol Brian Rachel Kevin Claire Edward Grace Ian Joan
"""
_CITIES = """
Paris London Berlin Madrid Rome Vienna Dublin Lisbon Prague Oslo Athens Boston Chicago Tokyo Sydney Toronto
Dallas Denver Seattle Miami Houston Moscow Delhi Mumbai Cairo Lima Milan Munich Hamburg Zurich Geneva
Brussels Amsterdam Stockholm Copenhagen Budapest Warsaw Barcelona Singapore Dubai Beijing Shanghai Seoul
Bangkok Istanbul Melbourne Montreal Vancouver Austin Phoenix Atlanta Detroit Manchester Liverpool Glasgow
Oxford Cambridge Florence Venice Naples
"""
_JOBS = """
teacher doctor lawyer nurse writer farmer driver artist engineer designer manager pilot chef baker singer
actor editor student professor scientist officer banker dancer soldier painter developer architect analyst
"""
_COLORS = "red blue green yellow black white brown orange purple pink gray gold silver"
_ITEMS = """
table chair lamp book phone camera shirt jacket bag watch mirror clock desk sofa bottle knife bike guitar
piano pen ring hat coat dress glass plate cup box key door window carpet pillow blanket printer laptop
monitor keyboard tablet radio
"""
_ANIMALS = "dog cat horse bird fish cow sheep rabbit mouse duck snake turtle monkey tiger lion bear wolf fox"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_DISHES = "pizza pasta soup salad rice bread cake fish chicken beef cheese sushi curry burger steak pie"
_ROOMS = "kitchen bedroom bathroom office garage garden hall attic basement cellar"
_GENRES = "jazz rock pop blues classical metal folk soul country techno"
_LANGUAGES = (
    "German French Spanish Italian Dutch Swedish Polish Russian Greek Turkish Japanese Chinese Portuguese"
)
_TOPICS = "sports politics science music health business travel weather art history technology fashion"
_CURRENCIES = "dollars euros pounds francs"
_TASKS = "run swim sleep read cook paint work study clean shop pray train walk dance"
_COMMON = """
about above after again air all animal answer apple arm army back ball bank base bear beat beauty bed bell
best bird birth black block blood blue board boat body bone book born both bottom boy brain branch bread
break bridge bring brother build burn business camp capital car care case cat cause cell center chair chance
change check child choice church circle city class clean clear climb close cloud coast coat cold color
common copy corn cost cotton country course court cover cow cross crowd current dance danger dark date day
dead deal death deep depth desert desk dinner dirt doctor dog dollar door double dream dress drink drop dust
duty ear earth east easy edge effect egg energy engine enemy evening event face fact fall family farm father
fear field fight figure final finger fire fish flag flat floor flow flower food foot force forest form free
fresh friend front fruit full future game garden gate gift girl glass goal gold grass green ground group
guard guide hair half hall hand happy harbor hat head health heart heat heavy hill history hole holiday home
honey hope horse hospital hotel hour house human hunger ice idea inch industry iron island job journey judge
juice jump key king kitchen knee knife land language laugh law leaf leather leg lemon letter level library
life light line lip list little machine map mark market master match meal meat memory metal middle milk mind
mine minute mirror money moon morning mother motion mountain mouth music name nation nature neck need needle
nerve net news night noise north nose note number ocean office oil opinion orange order organ page pain
paint paper parent park part party past peace pencil people person picture pig place plane planet plant
plate play pocket point poison port potato powder power present price prison process profit purpose quality
queen question rain range rate ray reason record red reward rhythm rice right ring river road rock roof room
root rule sail salt sand scale school science sea seat second secret seed sense shade shadow shape shelf
ship shirt shock shoe shop short side sign silk silver simple sister size skin sky sleep slope small smell
smile smoke snake snow society soil soldier song sound soup south space spoon sport spring square stage
stamp star station steam steel stem step stick stone stop store storm story street strong study summer sun
support surface sweet system table tail taste teacher team test theory thing thought thread throat thumb
thunder ticket time tin tongue tool tooth town trade train travel tree trick trouble truck turn unit value
verse vessel view village voice walk wall war water wave wax way weather week weight west wheel whip wide
wife wild wind window wine wing winter wire woman wood wool word work world worm wound writer year yellow
young banana cheese pepper butter letter coffee tomato summer little puzzle castle circle candle turtle
purple marble dinner rabbit hammer ladder
"""


_STRANGE_SHARE = 0.4


def draw_value(random: Random, kind: str, is_wide: bool) -> str:
    """A word of the class. is_wide: or any word at all, so that a value has to be copied from where it stands
    and cannot be guessed from its class.
    """
    if is_wide and random.random() < _STRANGE_SHARE:
        return random.choice(spelled_words())
    return random.choice(values()[kind])


def is_one_token(text: str) -> bool:
    return vocabulary().id_of(text.encode()) is not None


def _words(listing: str) -> tuple[str, ...]:
    """Those of the list that are one token with a blank before them and without."""
    unique = dict.fromkeys(listing.split())
    return tuple(word for word in unique if is_one_token(word) and is_one_token(f" {word}"))


@lru_cache(maxsize=1)
def values() -> dict[str, tuple[str, ...]]:
    """Class of a value -> its words."""
    return {
        "name": _words(_NAMES),
        "city": _words(_CITIES),
        "job": _words(_JOBS),
        "color": _words(_COLORS),
        "item": _words(_ITEMS),
        "animal": _words(_ANIMALS),
        "day": _words(_DAYS),
        "month": _words(_MONTHS),
        "dish": _words(_DISHES),
        "room": _words(_ROOMS),
        "genre": _words(_GENRES),
        "language": _words(_LANGUAGES),
        "topic": _words(_TOPICS),
        "currency": _words(_CURRENCIES),
        "task": _words(_TASKS),
    }


@lru_cache(maxsize=1)
def spelled_words() -> tuple[str, ...]:
    """Words for text operations: 3 to MAX_LETTERS lower-case letters."""
    return tuple(word for word in _words(_COMMON) if 3 <= len(word) <= MAX_LETTERS)
