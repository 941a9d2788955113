"""Figures of images against their definitions."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from sdgraph.errors import ExtraError
from sdgraph.evaluation import metrics


@pytest.fixture(scope="module")
def noisy() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.random((3, 20, 24, 3))
    return a, np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)


def test_psnr_is_its_definition(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = noisy
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(1 / ((a - b) ** 2).mean()))
    assert metrics.psnr(np.zeros((1, 8, 8, 3)), np.full((1, 8, 8, 3), 0.1)) == pytest.approx(20)
    assert metrics.psnr(a, a) == math.inf


def test_ssim_is_its_definition(noisy: tuple[np.ndarray, np.ndarray]) -> None:
    """The formula at one window position, by weighted moments."""
    a, b = noisy
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for x, y in zip(
        a.transpose(0, 3, 1, 2).reshape(-1, 20, 24), b.transpose(0, 3, 1, 2).reshape(-1, 20, 24), strict=True
    ):
        for i in range(10):
            for j in range(14):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                top = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                found.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert metrics.ssim(a, b) == pytest.approx(np.mean(found))
    assert metrics.ssim(a, a) == pytest.approx(1)


def test_without_the_extra_perceptual_figures_name_it(
    noisy: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ExtraError, match=r"torchvision(.*\n)*.*pip install -e '\.\[quality\]'"):
        metrics.lpips(*noisy)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraError, match=r"transformers(.*\n)*.*pip install -e '\.\[pipelines\]'"):
        metrics.clip_score(noisy[0], ["a", "b", "c"])
