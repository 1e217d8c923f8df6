"""The trace formats that can be read, one module each."""
