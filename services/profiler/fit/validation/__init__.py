"""How far profiles are from measurements: one module for each source, ``report`` prints them."""
