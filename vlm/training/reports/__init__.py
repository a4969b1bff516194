"""What a run tells: its lines, curves and boards, and what went wrong."""
