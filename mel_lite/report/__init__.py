"""Reports and comparisons of runs, from the files in their folders."""
