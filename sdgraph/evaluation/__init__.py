"""Quality of images before and after a change of a UNet: `evaluate`, and the metrics of images.

It imports `runtime` and what lies below.
"""
