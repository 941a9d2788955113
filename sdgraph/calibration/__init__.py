"""Decisions made by measuring on prompts: schedules that are searched for.

It imports `runtime` and what lies below; it trains nothing.
"""
