"""Engines that take the same distillation step, each as a process of its own: `python -m benchmarks.engines.NAME DIR`.

DIR holds the problem, as `benchmarks.peers` writes it: `teacher/` and `student/` in Hugging Face's layout, `tokens.npy`
[N, B, T], a batch each, and `problem.json`. The step: forward KL at temperature 1 on every token but each row's last,
its mean over them, AdamW. An engine whose packages do not go with ours has an environment of its own, so it imports
nothing of kdjax.
"""
