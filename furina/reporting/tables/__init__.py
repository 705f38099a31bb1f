"""Tables of cells, and their four forms: terminal, Markdown, CSV and LaTeX."""
