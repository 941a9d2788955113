"""The redundancy of a UNet: how much images change if one of its regions is removed, and what that saves.

`analyse` measures it, `Redundancy` holds it and chooses removals for a budget.
"""
