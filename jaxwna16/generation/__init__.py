"""From prompts to text; `language` is the way in."""
