"""Captions of scenes by a small grammar with paraphrases: how they are written and parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
PLACE_PHRASES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "above the centre"),
    "bottom": ("at the bottom", "below the centre"),
}
# Phrases for the relation of the object at a place to the other object.
RELATIONS = {
    "left": ("on the left of", "to the left of", "left of"),
    "right": ("on the right of", "to the right of", "right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
BACKGROUND = "on a {} background"
_PHRASES = [*SIZE_WORDS.values(), *PLACE_PHRASES.values(), *RELATIONS.values(), ("a an and on background",)]
WORDS = sorted(
    {word for phrases in _PHRASES for phrase in phrases for word in phrase.split()} | {*SHAPES, *COLOURS, *BACKGROUNDS}
)


class CaptionError(ValueError):
    """A text is no caption of a scene."""


@dataclass(frozen=True)
class Mention:
    """An object as a caption describes it. Attributes that the caption leaves out are None."""

    shape: str
    colour: str
    size: str | None
    place: str | None


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption that is true of `scene`. It sometimes leaves out sizes, places or the background."""
    sized, placed, backed = rng.random(3) < (0.85, 0.9, 0.7)
    names = [_noun_phrase(thing, sized, rng) for thing in scene.things]
    text = (_two if len(names) == 2 else _one)(scene, names, placed, rng)
    return f"{text} {BACKGROUND.format(scene.background)}" if backed else text


def mentions(text: str) -> tuple[Mention, ...]:
    """Parse a caption.

    Args:
        text: the caption.
    Returns:
        The objects that it mentions, in the order of the text.
    Raises:
        CaptionError: the text has a word that no caption has, or does not follow the grammar.
    """
    check_words(text)
    sentence = _SENTENCE.fullmatch(" ".join(text.lower().split()))
    if sentence is None:
        raise CaptionError(f"{text!r} is no caption of a scene; an example is 'a red circle above a small blue star'")
    first, phrase, second, relation = sentence["first"], sentence["place"], sentence["second"], sentence["relation"]
    if second is None:
        return (_mention(first, _MEANING.get(phrase)),)
    place = _MEANING.get(relation)
    return _mention(first, place), _mention(second, OPPOSITE.get(place or ""))


def check_words(text: str) -> None:
    """Check that a text has only words of captions, for the model has seen no other words.

    Raises:
        CaptionError: the text has other words.
    """
    unknown = [word for word in text.lower().split() if word not in WORDS]
    if unknown:
        raise CaptionError(f"unknown words in {text!r}: {', '.join(unknown)}; captions consist of {', '.join(WORDS)}")


def _one(scene: Scene, names: list[str], placed: bool, rng: np.random.Generator) -> str:
    return f"{names[0]} {_pick(rng, PLACE_PHRASES[scene.things[0].place])}" if placed else names[0]


def _two(scene: Scene, names: list[str], placed: bool, rng: np.random.Generator) -> str:
    first = int(rng.integers(2))  # which object the sentence begins with
    relation = _pick(rng, RELATIONS[scene.things[first].place]) if placed else "and"
    return f"{names[first]} {relation} {names[1 - first]}"


def _noun_phrase(thing: Thing, sized: bool, rng: np.random.Generator) -> str:
    words = [_pick(rng, SIZE_WORDS[thing.size])] if sized else []
    words += [thing.colour, thing.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _pick(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[rng.integers(len(phrases))]


def _any_of(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(words)})"


def _phrases(*parts: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the meanings of all phrases."""
    return {phrase: meaning for part in parts for meaning, phrases in part.items() for phrase in phrases}


_MEANING = _phrases(PLACE_PHRASES, RELATIONS)
_SIZE_MEANING = _phrases(SIZE_WORDS)
_NOUN_PHRASE = f"an? (?:{_any_of(_SIZE_MEANING)} )?{_any_of(COLOURS)} {_any_of(SHAPES)}"
_SENTENCE = re.compile(
    f"(?P<first>{_NOUN_PHRASE})"
    f"(?: (?P<place>{_any_of(_phrases(PLACE_PHRASES))})"
    f"| (?P<relation>and|{_any_of(_phrases(RELATIONS))}) (?P<second>{_NOUN_PHRASE}))?"
    f"(?: {BACKGROUND.format(_any_of(BACKGROUNDS))})?"
)


def _mention(noun_phrase: str, place: str | None) -> Mention:
    *size, colour, shape = noun_phrase.split()[1:]
    return Mention(shape, colour, _SIZE_MEANING[size[0]] if size else None, place)
