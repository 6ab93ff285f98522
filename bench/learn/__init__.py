"""``python -m bench learn``: what methods learn in equal forwards, each with a step size of one search."""
