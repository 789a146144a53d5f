"""Many requests served at once by one model: what each gets does not depend on the others."""
