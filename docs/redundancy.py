"""The heat map of the model of scenes in the documentation.

    python docs/redundancy.py

It takes minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sdgraph

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))
PROMPTS = ("a large red circle", "a small blue square", "a green triangle on the left", "a yellow star")


def main() -> None:
    from scenes.pipeline import load

    found = sdgraph.analyse(load(), PROMPTS, levels=["block", "layer"], target=None, calls=4, num_inference_steps=12)
    found.draw(DOCS / "redundancy.svg")


if __name__ == "__main__":
    main()
