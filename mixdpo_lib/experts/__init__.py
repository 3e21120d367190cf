"""What does each expert say? Families of experts behind one contract."""
