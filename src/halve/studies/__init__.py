"""Many models made and measured to answer one question: search, published tables, layers."""
