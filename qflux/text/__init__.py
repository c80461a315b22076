"""Text as ids: works, windows and vocabularies."""
