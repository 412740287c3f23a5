"""OLMo 2 and its relatives."""
