"""Text models inside of a whole that has towers beside them."""
