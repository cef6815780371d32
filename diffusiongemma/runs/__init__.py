"""Runs, adapters and Hugging Face folders: opened, converted, written."""
