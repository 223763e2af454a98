"""What runs in the program's process, or beside it: confining, keeping, hosting. Loaded by a bare interpreter, so it
imports nothing above it."""
