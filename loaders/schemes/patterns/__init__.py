"""Regular expressions of a config; `patterns` is the way in."""
