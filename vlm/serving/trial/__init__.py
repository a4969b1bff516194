"""A trial of the server: made-up clips, a server process, clients that ask as fast as they can."""
