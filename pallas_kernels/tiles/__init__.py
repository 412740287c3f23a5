"""How work is divided; `dense_rules` and `expert_rules` are the ways in."""
