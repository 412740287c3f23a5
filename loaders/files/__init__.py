"""The bytes of a checkpoint; `folder` is the way in, `write` the way out."""
