"""Llama and its relatives."""
