"""Answers measured: how many are right, whether a model's confidence holds, when to abstain."""
