"""Load task files and datasets into rows of prompt and answer."""
