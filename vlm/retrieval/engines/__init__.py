"""Embedding on more than one machine: a list of tasks, engines that run them, the joining of their parts."""
