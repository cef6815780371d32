"""Tokenizers, chat templates, and the syntax of messages and tool calls."""
