"""Every type that crosses a process boundary, one file per noun."""
