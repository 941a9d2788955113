"""Drawing of scenes: a shape is a signed distance, from which the coverage of a pixel follows."""

from __future__ import annotations

import numpy as np

from .scene import Scene

SIZE = 64  # pixels


def draw(scene: Scene) -> np.ndarray:
    """Draw `scene` as an anti-aliased uint8 image (64, 64, 3)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # centres of the pixels
    image = np.broadcast_to(np.array(scene.rgb), (SIZE, SIZE, 3)).copy()
    for thing in scene.things:
        px, py = (x - thing.position[0]) / thing.radius, (y - thing.position[1]) / thing.radius
        distance = thing.radius * (np.hypot(px, py) - 1 if thing.shape == "circle" else _polygon(px, py, thing.shape))
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # of a pixel whose edge lies `distance` pixels away
        image += coverage * (np.array(thing.rgb) - image)
    return np.round(image).astype(np.uint8)


def _ring(points: int, *radii: float, turn: float = -0.25) -> np.ndarray:
    """Return corners around the origin with alternating radii. The first is `turn` of a circle from the right."""
    angle = 2 * np.pi * (np.arange(points) / points + turn)
    radius = np.resize(radii, points)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


_ARM, _HALF = 1.15, 0.36  # of the cross
# Corners for radius 1, of about the area of the circle of radius 1, y pointing down.
CORNERS = {
    "square": _ring(4, 1.22, turn=0.125),
    "triangle": _ring(3, 1.4) + np.array([0, 0.2]),
    "star": _ring(10, 1.4, 0.56),
    "diamond": np.array([[0, -1.4], [0.9, 0], [0, 1.4], [-0.9, 0]]),
    "cross": np.array(
        [
            [_HALF, -_ARM], [_HALF, -_HALF], [_ARM, -_HALF], [_ARM, _HALF], [_HALF, _HALF], [_HALF, _ARM],
            [-_HALF, _ARM], [-_HALF, _HALF], [-_ARM, _HALF], [-_ARM, -_HALF], [-_HALF, -_HALF], [-_HALF, -_ARM],
        ]
    ),
}  # fmt: skip


def _polygon(x: np.ndarray, y: np.ndarray, shape: str) -> np.ndarray:
    """Return the signed distance of points to a polygon, negative inside.

    It is the exact distance to the nearest edge, with the sign by the even-odd rule.

    Source:
        I. Quilez, "2D distance functions".
    """
    corners = CORNERS[shape]
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex**2 + ey**2), 0, 1)
        distance = np.minimum(distance, np.hypot(wx - along * ex, wy - along * ey))
        if ey:
            inside ^= ((ay > y) != (by > y)) & (wx < wy * ex / ey)
    return np.where(inside, -distance, distance)
