"""What the studies' reports are made of: tables, figures, pages, files, and where a result came from."""
