"""The model family: one config, one Transformer, pure functions of a parameter tree."""
