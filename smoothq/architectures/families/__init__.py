"""Model families, a file each, and the list of those that are refused."""
