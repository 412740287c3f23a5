"""The command `jaxwna16`: one module per verb, with `configure`, `run` and `show`."""
