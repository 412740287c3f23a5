"""From prompts to text: `load_model`, then `generate`."""
