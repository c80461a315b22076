"""What a model does: its layers, recorded."""
