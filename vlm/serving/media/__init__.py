"""Pictures and playable clips of indexed videos, made in processes of their own, kept in a bounded cache."""
