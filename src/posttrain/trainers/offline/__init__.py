"""What trainers share that learn from completions in the data: pairs, and the reference's log-probs of them."""
