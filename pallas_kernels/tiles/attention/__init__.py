"""How the work of attention is divided: of one new token, and of a piece."""
