"""A process of its own, with limits, for what a stranger's file can make run without end."""
