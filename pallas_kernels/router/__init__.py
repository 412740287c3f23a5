"""How a router's logits choose experts: what all forms of `route` share."""
