"""The way from a diffusers UNet to a `Graph`: checks of the source, its inputs, its calling convention.

It imports `graph` and what lies below; it knows no passes.
"""
