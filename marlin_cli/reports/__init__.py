"""Results as people and programs read them: tables, JSON, CSV, pages, files of results, and what changed between two."""
