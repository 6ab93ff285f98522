"""Complete programs; ``zokernels demo`` runs demo.py."""
