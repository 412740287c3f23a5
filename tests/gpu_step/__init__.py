"""Whole programs of generation, compiled for a GPU that is not there, and read kernel by kernel."""
