"""Text from a trained model; nothing here knows a model but by what it can do."""
