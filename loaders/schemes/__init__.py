"""What config.json says of quantization; `quantization_config` is the way in."""
