"""How workers reach each other for bulk data: authenticated links by topic, and shared segments."""
