"""The table of what tuning recovers."""

from __future__ import annotations

from typing import Any

from tables import markdown


def table(result: dict[str, Any]) -> str:
    """Return the figures at the first point as Markdown, with what they were measured on."""
    rows = [("UNet", "parameters", "time", "shape and colour", "place", "Fréchet", "PSNR", "SSIM")]
    for name, way in result["ways"].items():
        point = way["points"][0]
        shares = (f"{100 * point[key]:.1f} %" for key in ("shape and colour", "place"))
        close = (f"{point['psnr']:.1f} dB", f"{point['ssim']:.3f}") if "psnr" in point else ("-", "-")
        size = f"{way['parameters'] / 1e6:.2f} M"
        rows.append((name, size, f"{point['time']:.2f}", *shares, f"{point['frechet']:.0f}", *close))
    teacher = result["ways"]["teacher"]
    point = teacher["points"][0]
    quick = " **A quick run: smoke test, no figures to quote.**" if result["quick"] else ""
    return (
        f"{teacher['device']}, float32; torch {teacher['torch']}, diffusers {teacher['diffusers']}; {result['steps']} "
        f"optimizer steps of {result['batch']} samples; {result['captions']} held-out captions, {point['steps']} steps "
        f"of {point['solver']}; time of the processor as a share of the teacher's; PSNR (median) and SSIM to the "
        f"teacher's images ({teacher['date'][:10]}).{quick}\n\n{markdown(rows)}"
    )
