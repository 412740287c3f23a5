"""Reading what config.json says of a model; `language_config` is what all families have."""
