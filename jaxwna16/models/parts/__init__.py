"""What definitions are made of."""
