"""What each address of the service does."""
