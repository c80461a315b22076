"""What a model does with a text, as a page, figures and data files."""
