"""Shipped data: the Shakespeare corpus and its tokenizer."""
