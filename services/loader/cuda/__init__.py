"""Loading into a GPU's memory: files read, checked, repacked and hashed. Imported only by a loader for a GPU."""
