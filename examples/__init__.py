"""Programs to copy from, each in a folder with a README."""
