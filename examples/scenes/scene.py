"""Scenes: one or two objects on a plain background, at random from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 60),
    "green": (50, 165, 70),
    "turquoise": (60, 205, 205),
    "blue": (45, 80, 220),
    "purple": (130, 55, 175),
    "pink": (250, 140, 195),
}
SIZES = {"large": 10.0, "small": 6.0}  # radius in pixels, of the circle of about the same area
PLACES = {"centre": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}  # x, y
BACKGROUNDS = {"white": (245, 245, 245), "grey": (125, 125, 125), "black": (20, 20, 20)}
ARRANGEMENTS = (("left", "right"), ("top", "bottom"))  # of two objects

# Pairs of shape and colour that training never shows. It shows each of these shapes and colours in other pairs.
HELD_OUT = frozenset(
    {
        ("circle", "blue"),
        ("square", "yellow"),
        ("triangle", "purple"),
        ("star", "green"),
        ("diamond", "red"),
        ("cross", "orange"),
    }
)


@dataclass(frozen=True)
class Thing:
    """An object: its attributes in words, its position (x, y) and radius in pixels, and its colour (RGB, 0 to 255)."""

    shape: str
    colour: str
    size: str
    place: str
    position: tuple[float, float]
    radius: float
    rgb: tuple[float, float, float]

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background. The first of two objects is the left or the upper one."""

    things: tuple[Thing, ...]
    background: str
    rgb: tuple[float, float, float]


def scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a random scene, with two objects in half of the cases.

    Args:
        rng: the random generator.
        held_out: whether the scene has a pair of `HELD_OUT`. Training scenes have none, so the two sets have no
            combination of objects in common.
    """
    places = ARRANGEMENTS[rng.integers(2)] if rng.random() < 0.5 else (_one_of(rng, PLACES),)
    while True:
        words = [(_one_of(rng, SHAPES), _one_of(rng, COLOURS)) for _ in places]
        if held_out:
            words[rng.integers(len(words))] = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        if any(pair in HELD_OUT for pair in words) == held_out:
            break
    things = tuple(_thing(rng, *pair, place) for pair, place in zip(words, places, strict=True))
    background = _one_of(rng, BACKGROUNDS)
    return Scene(things, background, _shade(rng, BACKGROUNDS[background], together=True))


def _thing(rng: np.random.Generator, shape: str, colour: str, place: str) -> Thing:
    size = _one_of(rng, SIZES)
    x, y = PLACES[place]
    return Thing(
        shape,
        colour,
        size,
        place,
        position=(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)),
        radius=SIZES[size] * rng.uniform(0.93, 1.07),
        rgb=_shade(rng, COLOURS[colour]),
    )


def _shade(rng: np.random.Generator, rgb: tuple[int, int, int], together: bool = False) -> tuple[float, float, float]:
    """Move the channels of `rgb`, separately or all `together`, by up to 8."""
    r, g, b = np.clip(np.array(rgb) + rng.uniform(-8, 8, 1 if together else 3), 0, 255).tolist()
    return r, g, b


def _one_of(rng: np.random.Generator, names: dict[str, object] | tuple[str, ...]) -> str:
    return tuple(names)[rng.integers(len(names))]
