"""Lists the objects of the embedded data set: OpenMoji glyphs (CC BY-SA 4.0), chosen by eye.

Each glyph has a filled body, so that its alpha is its mask, and no two classes look alike.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

CREDIT = "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org)"
LICENCE = "CC BY-SA 4.0"
LICENCE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"


class Category(NamedTuple):
    """Describes a class of countable objects: its name, the group that it belongs to and the glyphs that show it."""

    name: str
    supercategory: str
    glyphs: str


# The order is the rank in a long-tailed set, and a set of N categories takes the first N.
THINGS = (
    Category("person", "person", "👨👩👴👵👮👷"),
    Category("car", "vehicle", "🚗🚘🚕🚖🚙"),
    Category("tree", "plant", "🌲🌳🌴🎄"),
    Category("house", "structure", "🏠🏘🏚🛖"),
    Category("dog", "animal", "🐕🐶🐩"),
    Category("cat", "animal", "🐈🐱😸😾"),
    Category("bird", "animal", "🐦🦆🦅🦢🦜"),
    Category("flower", "plant", "🌷🌹🌺🌻🌼"),
    Category("bus", "vehicle", "🚌🚍🚎"),
    Category("truck", "vehicle", "🚚🚛🚒🚑"),
    Category("fruit", "food", "🍎🍊🍋🍑🍐"),
    Category("ball", "sports", "⚽🏀🎾🏈🏐"),
    Category("cow", "animal", "🐄🐂🐃🐮"),
    Category("airplane", "vehicle", "✈🛩🛫🛬"),
    Category("train", "vehicle", "🚂🚃🚆🚊🚋"),
    Category("fish", "animal", "🐟🐠🐡🦈"),
    Category("cake", "food", "🍰🎂🧁🥧"),
    Category("shoe", "clothing", "👞👟👠👢🥾"),
    Category("hat", "clothing", "🎩👒🧢🪖"),
    Category("bag", "accessory", "🎒👜💼🧳"),
    Category("horse", "animal", "🐎🐴"),
    Category("garment", "clothing", "👕👚👗🥼"),
    Category("building", "structure", "🏢🏥🏨🏫🏬"),
    Category("instrument", "music", "🎸🎻🪕🎺"),
    Category("insect", "animal", "🐝🐞🦋🪲"),
    Category("monkey", "animal", "🐒🐵🦍🙈"),
    Category("book", "indoor", "📕📗📘📙📖"),
    Category("umbrella", "accessory", "☂🌂"),
    Category("clock", "indoor", "🕒🕗⏰"),
    Category("drink", "food", "☕🍵🍺🥤"),
    Category("sandwich", "food", "🍔🌭🥪🌮"),
    Category("computer", "indoor", "💻🖥📺"),
)

# One glyph, one class. About half of them are glyphs of THINGS too, as ImageNet and ADE20K share kinds of objects.
UPSTREAM = (
    "🐶🐕🐱🐈🐴🐮🐄🐦🦆🦅🦢🦜🐟🐠🐡🦈🚗🚕🚙🚌🚚🚒🚂🚊✈🌲🌳🌴🌷🌹🌻🏠🏢🏫🍎🍊🍋🍐⚽🏀🎾🎂🍰🧁👞👟👠👢🎩👒🧢🎒👜💼👕👗🎸🎻🎺"
    "🐯🐷🐘🐸🐼🐻🦁🦊🐰🐨🐧🐢🐙🦀🐌🦒🦏🦘🦩🦉🦇🦔🐍🐊🍌🍇🍓🍍🍉🥕🌽🍄🍅🍆🥑🍔🍕🍩🍪🍦🥨🧀🚀🚁🚜🚲🛵☂🎈🎁⏰🔔💡📷☎🪑🧸🎃🏆🔒⛄"
)

# Scenes show these as unlabelled objects (value 0); no category has any of them, however many categories there are.
DISTRACTORS = "".join(char for char in UPSTREAM if not any(char in thing.glyphs for thing in THINGS))


def class_name(char: str) -> str:
    """Returns the folder name of an upstream class, from the Unicode name of its glyph: 🐶 gives 'dog_face'."""
    return unicodedata.name(char).lower().replace(" ", "_").replace("-", "_")
