"""What trainers share that learn from their own completions: rollouts, scores, rows, and what is recorded of them."""
