"""A notebook and a profile become a recorded result. Knows notebooks and folders, no model and no study."""
