"""Files of weights: safetensors headers and shards, and replacing a file in one go."""
