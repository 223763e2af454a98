"""How rewards are called: what each call contains, where it runs (inline, in a thread, in a process), and what its answer means."""
