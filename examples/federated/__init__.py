"""Federated demonstrations: every client is a process."""
