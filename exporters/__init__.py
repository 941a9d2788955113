"""Exporters of transformed UNets."""
