"""The demo that is installed with the package: `python -m sfron_fast demo`."""
