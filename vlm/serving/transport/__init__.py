"""What any request passes: admission, security, bounded bodies, byte ranges, metrics, errors as answers."""
