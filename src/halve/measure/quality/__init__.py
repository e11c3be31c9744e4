"""How good a model is: perplexity and multiple choice. START HERE: `evaluate.py`."""
