"""Folders of the server's own choice brought into its index while it serves."""
