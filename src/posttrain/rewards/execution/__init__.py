"""How rewards are called: what each call contains and what its answer means (calls), in this process (inline) or in
others (process, worker)."""
