"""What a change of a UNet does to the images of a pipeline: `evaluate`, and the metrics of images.

It imports `runtime` and what lies below.
"""
