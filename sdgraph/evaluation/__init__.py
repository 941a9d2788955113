"""The effect of a change of a UNet on the images of a pipeline: `evaluate`, and the metrics of images.

It imports `runtime` and what lies below.
"""
