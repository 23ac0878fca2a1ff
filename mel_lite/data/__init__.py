"""Task files and data sets, read into rows of prompt and answer."""
