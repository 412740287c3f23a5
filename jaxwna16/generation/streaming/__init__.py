"""Text while it is generated: what is final, and where a stop string ends it."""
