"""Prompts: tasks, what prompts are worth at them, candidates for better ones, and the choice among these."""
