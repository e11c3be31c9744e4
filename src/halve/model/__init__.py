"""The decoder every family and every width runs on, and how Hugging Face names map onto it."""
