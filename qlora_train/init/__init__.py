"""`qlora-train init`: a commented recipe, planned to fit, for a base and data."""
