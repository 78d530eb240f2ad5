"""The paper: which visual tokens go, when, and what becomes of them. Arrays and plain ints; no model."""
