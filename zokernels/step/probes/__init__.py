"""How the closure sees perturbed weights: as copies, or as the weights themselves."""
