"""Which call of which generation this is, what it may inherit, and what that costs: the driver of every backend.

It imports `ir` and the vocabulary; who computes a call is not its business.
"""
