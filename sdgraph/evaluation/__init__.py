"""What a change of a UNet does to the images of a pipeline.

It imports `runtime` and what lies below.
"""
