"""Who learns from whom: the `learn` table, the terms of a loss and their state, and adaptors."""
