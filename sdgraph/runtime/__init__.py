"""`GraphUNet`, the module that takes the place of a UNet: `apply`, its call, saving, diffusers' other features.

It imports everything below: `compiler`, `frontend`, `inheritance`, `graph`.
"""
