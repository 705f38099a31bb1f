"""Pages: what a folder of results holds, as files and as one HTML page."""
