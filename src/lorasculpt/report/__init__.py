"""Results of runs as one page, one Markdown table and one JSON file with the same numbers."""
