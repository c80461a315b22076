"""The two model families, their configurations and presets."""
