"""Converted copies; `converted` is the way in."""
